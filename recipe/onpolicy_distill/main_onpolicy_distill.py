"""Entry point: Hydra -> typed config -> checks -> concrete classes -> ``verl.trainer.run``.

::

    python -m recipe.onpolicy_distill.main_onpolicy_distill \\
        actor_rollout_ref.model.path=STUDENT actor_rollout_ref.ref.model.path=TEACHER data.train_files=TRAIN.parquet

Everything a user can get wrong is looked at before Ray starts. Heavy imports wait until then, so ``--help`` is quick.
"""

import logging
import os
import sys
from functools import partial
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from verl.trainer.config.overrides import normalized_argv
from verl.trainer.config.preflight import check_run
from verl.trainer.config.typed import to_typed
from verl.utils.loopback import keep_to_loopback, stays_here

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.utils.vocab_contract import VocabContract

logger = logging.getLogger(__name__)


def build_trainer(config: "PPOConfig") -> "RayPPOTrainer":
    """Tokenizer, data, reward function and worker classes, put together; starts nothing.

    The algorithm decides the trainer: one learns from teachers, alone or beside a task reward, the other from a task
    reward alone.
    An ``extend_vocab_start_token`` that is ``auto`` becomes the id it stands for.
    """
    from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
    from verl.experimental.agent_loop.worker import load_tools
    from verl.trainer.dataloader import build_datasets
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.reward import load_reward_fn
    from verl.utils.device import get_device_name
    from verl.utils.tokenizer import hf_tokenizer
    from verl.workers.student_worker import StudentWorker
    from verl.workers.teacher_worker import TeacherWorker

    device_name = get_device_name(config.trainer.device)
    check_ranks(config, device_name)
    prepare_folder(config.trainer.default_local_dir)
    reward_fn = load_reward_fn(config.custom_reward_function)
    contract = settle_vocabulary(config)
    config.check_extension()
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    distill = config.algorithm.distill
    tokenizer = hf_tokenizer(model.tokenizer_path or str(model.path), trust_remote_code=model.trust_remote_code)
    train_dataset, val_dataset = build_datasets(
        config.data,
        tokenizer,
        extend_vocab_start_token=rollout.extend_start,
        extended_sources=distill.extended_sources,
        tool_schemas=[tool.get_openai_tool_schema() for tool in load_tools(rollout).values()],
        dropped_rows_folder=config.trainer.default_local_dir,
    )
    trainer_class = RayOnPolicyDistillTrainer if config.algorithm.distils else RayPPOTrainer
    return trainer_class(
        config,
        tokenizer,
        {"actor": StudentWorker, **dict.fromkeys(distill.roles, TeacherWorker)},
        train_dataset,
        val_dataset,
        reward_fn,
        device_name=device_name,
        vocab_fingerprint=contract.fingerprint if contract else None,
    )


def settle_vocabulary(config: "PPOConfig") -> "VocabContract | None":
    """Check that the vocabularies fit together, and put the id in the place of ``extend_vocab_start_token=auto``.

    Returns:
        What the two models share; None where there is no teacher of its own, or ``trainer.vocab_check=off``.

    Raises:
        ValueError: a tokenizer is missing, or under ``trainer.vocab_check=strict`` the two do not fit.
    """
    from verl.utils.vocab_contract import enforce, read_contract

    model, teacher = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    rollout, mode = config.actor_rollout_ref.rollout, str(config.trainer.vocab_check)
    if not teacher.path:
        if rollout.extend_vocab_start_token == "auto":
            rollout.extend_vocab_start_token = None  # the student's own starting weights are the reference
        return None
    if mode == "off":
        return None
    contract = read_contract(
        str(model.path),
        teacher.path,
        rollout.extend_vocab_start_token,
        student_tokenizer=model.tokenizer_path,
        teacher_tokenizer=teacher.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )
    enforce(contract, mode)
    rollout.extend_vocab_start_token = contract.extend_start
    asked = config.algorithm.distill.asked_topk or 0
    if asked > contract.shared_ids:
        raise ValueError(
            f"algorithm.distill.topk={asked} is more than the {contract.shared_ids} ids that student and teacher "
            "share; lower it, or set algorithm.distill.objective=exact for all of them"
        )
    for name, further in config.algorithm.distill.teachers.items():
        if further.path is not None:
            check_further_teacher(config, name)
    return contract


def check_further_teacher(config: "PPOConfig", name: str) -> None:
    """Hold a teacher of ``algorithm.distill.teachers`` to what it is said to know.

    Raises:
        ValueError: under ``trainer.vocab_check=strict``, it does not fit the student.
    """
    from verl.utils.vocab_contract import enforce, read_contract

    model, teacher = config.actor_rollout_ref.model, config.algorithm.distill.teachers[name]
    start = None if teacher.reads_extended else config.actor_rollout_ref.rollout.extend_start
    contract = read_contract(
        str(model.path),
        str(teacher.path),
        start,
        student_tokenizer=model.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )
    try:
        enforce(contract, str(config.trainer.vocab_check))
    except ValueError as error:
        raise ValueError(
            f"algorithm.distill.teachers.{name} (vocabulary={teacher.vocabulary}) does not fit: {error}"
        ) from error


def check_ranks(config: "PPOConfig", device_name: str) -> None:
    """On a Ray of the run's own, this machine has to hold all ranks; a cluster says itself what it has.

    Raises:
        ValueError: it does not.
    """
    from verl.single_controller.ray.resource_pool import CPUS_PER_PROCESS
    from verl.utils.device import get_torch_device

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


@hydra.main(version_base=None, config_path="config", config_name="onpolicy_distill_trainer")
def hydra_main(cfg: DictConfig) -> None:
    """Compose, type and check the configuration, read the data, then run."""
    try:
        config = to_typed(cfg)
        if stays_here(config.ray_kwargs.ray_init):
            keep_to_loopback()
        for notice in check_run(config):
            logger.warning(notice)
        trainer = build_trainer(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from verl.trainer.run import run

    run(trainer, partial(build_trainer, config))


def main() -> None:
    """Accept the command line as users of verl write it, then hand it to Hydra."""
    try:
        sys.argv[1:] = normalized_argv(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    hydra_main()


if __name__ == "__main__":
    main()
