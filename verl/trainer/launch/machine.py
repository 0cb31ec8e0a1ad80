"""What a run needs of the machine that it starts on, checked before Ray starts.

In: the configuration, and the kind of device. Out: the run's folder, or an error that says what this machine does not
have. Not here: other machines (``single_controller.ray.node_check``).
"""

import os
from tempfile import TemporaryFile

import torch

from verl.config import PPOConfig
from verl.single_controller.ray.resource_pool import CPUS_PER_PROCESS


def check_ranks(config: PPOConfig, device_name: str) -> None:
    """Check that this machine can hold all ranks of a run that starts a Ray of its own; Ray checks those of a cluster.

    Raises:
        ValueError: it cannot.
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
        limit = torch.cuda.device_count()
        available = f"has {limit} GPUs"
    else:
        cores = ray_init["num_cpus"] if "num_cpus" in ray_init else len(os.sched_getaffinity(0))
        limit = int(cores / CPUS_PER_PROCESS)
        available = f"can hold {limit} ranks on its {cores} cores"
    wanted, teacher = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}", sum(trainer.teacher_ranks_on_nodes)
    if teacher:
        wanted += f" and trainer.teacher_n_gpus_per_node={teacher}"
    if trainer.n_gpus_per_node + teacher > limit:
        raise ValueError(f"{wanted}: this machine {available}; lower {'them' if teacher else 'it'} so far")


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
