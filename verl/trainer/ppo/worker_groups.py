"""The ranks of each role: the resource pools, and the worker groups that run in them.

::

    co-located        pool "train"     rank r: actor + ref          (one process, one process group)
    teacher apart     pool "train"     rank r: actor                (a process group of its own)
                      pool "teacher"   rank s: ref                  (a process group of its own)

In: the trainer's settings and the worker class of each role. Out: a view per role, whose methods the trainer calls.
Rollout engines are placed beside the student's ranks (``agent_loop``); a teacher in its own pool has its GPUs alone.

Before the first worker starts on a cluster, ``check_nodes`` asks every node for what is read there:

==================================  ===================================================================
student's ranks, engines beside     student's model and tokenizer, the checkpoint to resume from
agent-loop workers (same nodes)     the configuration of tools and agent loops
teachers' ranks                     the teachers' models and tokenizer
driver alone                        data files, reward function: checked before Ray starts
==================================  ===================================================================
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.config import PPOConfig, TrainerConfig
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.single_controller.ray.base import RoleWorkerGroup
from verl.single_controller.ray.node_check import DISTRIBUTIONS, check_nodes_hold
from verl.single_controller.ray.resource_pool import RankPlace, reserve_all
from verl.trainer.checkpoint import layout as checkpoint

logger = logging.getLogger(__name__)

TRAIN, TEACHER = "train", "teacher"


@dataclass
class ResourcePoolManager:
    """The pools of a run, and the pool of each role."""

    resource_pool_spec: Mapping[str, Sequence[int]]
    """Ranks per node, by pool."""
    mapping: Mapping[str, str]
    """The pool of each role."""
    resource_pool_dict: dict[str, RayResourcePool] = field(default_factory=dict)
    """The pools, once created."""

    def create_resource_pool(self, use_gpu: bool) -> None:
        """Reserve the places of all pools; ``use_gpu``: one GPU per rank.

        Raises:
            ValueError: the cluster cannot hold them, or something else keeps what they need.
        """
        for name, ranks in self.resource_pool_spec.items():
            keys = "trainer.{0}n_gpus_per_node or trainer.{0}nnodes".format("teacher_" if name == TEACHER else "")
            self.resource_pool_dict[name] = RayResourcePool(ranks, use_gpu, name_prefix=name, settings=keys)
        reserve_all(list(self.resource_pool_dict.values()))

    def places(self, role: str) -> list[RankPlace]:
        """Where each rank of a role will run, in rank order; reserved already."""
        return self.resource_pool_dict[self.mapping[role]].reserve()

    def shutdown(self) -> None:
        """Give everything back, used or not; a second call does nothing."""
        for pool in self.resource_pool_dict.values():
            pool.remove()


def plan_pools(config: TrainerConfig, roles: Sequence[str]) -> ResourcePoolManager:
    """The pools that the settings ask for; nothing is reserved yet.

    Args:
        roles: ``actor``, then those of its frozen models.

    Raises:
        ValueError: a pool for a teacher that the run does not use.
    """
    train, teacher = config.ranks_on_nodes, config.teacher_ranks_on_nodes
    if not teacher:
        return ResourcePoolManager({TRAIN: train}, dict.fromkeys(roles, TRAIN))
    if len(roles) == 1:
        given = f"teacher_nnodes={config.teacher_nnodes}, teacher_n_gpus_per_node={config.teacher_n_gpus_per_node}"
        raise ValueError(f"trainer.{given}: this run uses no teacher; set both to null")
    mapping = {role: TRAIN if role == roles[0] else TEACHER for role in roles}
    return ResourcePoolManager({TRAIN: train, TEACHER: teacher}, mapping)


class WorkerGroups:
    """One worker group per pool; roles that share a pool share its processes."""

    def __init__(self) -> None:
        self._groups: list[RayWorkerGroup] = []

    def start(
        self,
        pools: ResourcePoolManager,
        worker_classes: Mapping[str, type],
        arguments_of: Callable[[str], Mapping[str, Any]],
    ) -> dict[str, RoleWorkerGroup]:
        """Start every rank of every role; returns while the processes still start.

        Args:
            worker_classes: by role; those without a pool are left out.
            arguments_of: what each role's workers are built with.
        """
        views: dict[str, RoleWorkerGroup] = {}
        for name, pool in pools.resource_pool_dict.items():
            roles = [role for role, pool_of_role in pools.mapping.items() if pool_of_role == name]
            logger.info("pool %s: %s, for %s", name, pool.describe(), " and ".join(roles))
            classes = {role: RayClassWithInitArgs(worker_classes[role], **arguments_of(role)) for role in roles}
            group = RayWorkerGroup(pool, classes, name_prefix=name)
            self._groups.append(group)
            views |= group.spawn(set(roles))
        return views

    def check_alive(self) -> None:
        """Raise ``WorkerError`` where a process of any group has died; returns at once."""
        for group in self._groups:
            group.check_alive()

    def watch(self, others: Callable[[], None]) -> None:
        """While a call of one group runs, check now and then that the other groups live, and call ``others``."""

        def check() -> None:
            self.check_alive()
            others()

        for group in self._groups:
            group.watch = check

    def shutdown(self) -> None:
        """End the processes; a second call does nothing."""
        for group in self._groups:
            group.shutdown()


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
            # It is deleted when it is closed, so it stays open until every node has answered.
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
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": models.rollout.agent.agent_loop_config_path,
        "trainer.resume_from_path": trainer.resume_from_path if trainer.resume_mode == "resume_path" else None,
    }


def teacher_paths(config: PPOConfig) -> dict[str, str | None]:
    """By setting, what the teachers' ranks read; one without a path is the student's starting weights."""
    model, teachers = config.actor_rollout_ref.ref.model, config.algorithm.distill.teachers
    paths = {f"algorithm.distill.teachers.{role}.path": teacher.path for role, teacher in teachers.items()}
    paths |= {"actor_rollout_ref.ref.model.path": model.path}
    if not all(paths.values()):
        student = config.actor_rollout_ref.model
        paths |= {
            "actor_rollout_ref.model.path": student.path,
            "actor_rollout_ref.model.tokenizer_path": student.tokenizer_path,
        }
    return paths | {"actor_rollout_ref.ref.model.tokenizer_path": model.tokenizer_path}
