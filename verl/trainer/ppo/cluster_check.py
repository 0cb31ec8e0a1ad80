"""Checks that each node of a cluster has what a run needs, before the first worker starts.

In: the configuration, and the pools whose places are reserved. Out: nothing, or a ValueError that names nodes.

==================================  ===================================================================
read by                             what
==================================  ===================================================================
student's ranks, engines beside     student's model and tokenizer, the checkpoint to resume from
agent-loop workers (same nodes)     the tools' configuration
teachers' ranks                     the teachers' models and tokenizer
driver alone                        data files, reward function: checked before Ray starts
==================================  ===================================================================
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from verl.config import PPOConfig
from verl.single_controller.ray.node_check import DISTRIBUTIONS, check_nodes_hold
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.ppo.worker_groups import ResourcePoolManager


def check_nodes(config: PPOConfig, pools: ResourcePoolManager) -> None:
    """Check that every node of the pools has what its processes will read, and the driver's code and packages.

    Raises:
        ValueError: what is missing or differs, and where.
    """
    packages = [name for name in DISTRIBUTIONS if name != "vllm" or config.actor_rollout_ref.rollout.name == "vllm"]
    trainer, student = config.trainer, student_paths(config)
    node_ips: dict[str, str] = {}
    needed: dict[str, dict[str, str]] = {}
    with ExitStack() as stack:
        if trainer.saves_checkpoints or checkpoint.find_checkpoint(trainer) is not None:
            # Ranks write or read checkpoints side by side in the run's folder: all have to see this file in it.
            folder = Path(trainer.default_local_dir).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-nodes-"))
            student["trainer.default_local_dir (the driver's file in it)"] = marker.name
        for role in pools.mapping:
            paths = student if role == "actor" else teacher_paths(config)
            for place in pools.places(role):
                node_ips[place.node_id] = place.node_ip
                needed.setdefault(place.node_id, {}).update({key: path for key, path in paths.items() if path})
        check_nodes_hold(needed, node_ips, packages)


def student_paths(config: PPOConfig) -> dict[str, str | None]:
    """By setting, what the student's ranks, the engines and the agent-loop workers read."""
    models, trainer = config.actor_rollout_ref, config.trainer
    return {
        "actor_rollout_ref.model.path": models.model.path,
        "actor_rollout_ref.model.tokenizer_path": models.model.tokenizer_path,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": models.rollout.multi_turn.tool_config_path,
        "trainer.resume_from_path": trainer.resume_from_path if trainer.resume_mode == "resume_path" else None,
    }


def teacher_paths(config: PPOConfig) -> dict[str, str | None]:
    """By setting, what the teachers' ranks read; one without a path is the student's starting weights."""
    model, teachers = config.actor_rollout_ref.ref.model, config.algorithm.distill.teachers
    paths = {f"algorithm.distill.teachers.{role}.path": teacher.path for role, teacher in teachers.items()}
    paths |= {"actor_rollout_ref.ref.model.path": model.path}
    if not all(paths.values()):
        paths |= {"actor_rollout_ref.model.path": config.actor_rollout_ref.model.path}
    return paths | {"actor_rollout_ref.ref.model.tokenizer_path": model.tokenizer_path}
