"""What a run asks of the machine that it starts on, looked at before Ray starts.

In: the configuration, and the kind of device it comes to. Out: the run's folder, or an error that says what this
machine does not have. Torch is asked for its GPUs; other machines are asked by ``single_controller.ray.node_check``.
"""

import os
from tempfile import TemporaryFile

from verl.config import PPOConfig
from verl.single_controller.ray.resource_pool import CPUS_PER_PROCESS
from verl.utils.device import get_torch_device


def check_ranks(config: PPOConfig, device_name: str) -> None:
    """On a Ray of the run's own, this machine has to hold all ranks; a cluster says itself what it has.

    Raises:
        ValueError: it does not.
    """
    ray_init, trainer = config.ray_kwargs.ray_init, config.trainer
    if "address" in ray_init:
        return
    for key, nodes in (("nnodes", trainer.nnodes), ("teacher_nnodes", trainer.teacher_nnodes or 1)):
        if nodes > 1:
            raise ValueError(
                f"trainer.{key}={nodes} and no cluster is named; start Ray on the machines "
                "(init_ray_cluster.sh HOSTFILE) and set ray_kwargs.ray_init.address=auto"
            )
    if device_name == "cuda":
        room, have = get_torch_device("cuda").device_count(), "GPUs"
    else:
        cores = ray_init["num_cpus"] if "num_cpus" in ray_init else len(os.sched_getaffinity(0))
        room, have = int(cores / CPUS_PER_PROCESS), f"ranks' room on its {cores} cores"
    asked, teacher = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}", sum(trainer.teacher_ranks_on_nodes)
    if teacher:
        asked += f" and trainer.teacher_n_gpus_per_node={teacher}"
    if trainer.n_gpus_per_node + teacher > room:
        raise ValueError(f"{asked}: this machine has {room} {have}; lower {'them' if teacher else 'it'} so far")


def prepare_folder(folder: str) -> None:
    """Create the run's folder.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):  # the one way to know: root passes every check of permissions
            pass
    except OSError as error:
        raise ValueError(
            f"trainer.default_local_dir={folder} (OUTPUT_DIR of the launch script) cannot be written: {error}; "
            "name a folder that you may write"
        ) from error
