"""The ranks of each role: the resource pools, and the worker groups that run in them.

::

    co-located        pool "train"     rank r: actor + ref          (one process, one process group)
    teacher apart     pool "train"     rank r: actor                (a process group of its own)
                      pool "teacher"   rank s: ref                  (a process group of its own)

In: the trainer's settings and the worker class of each role. Out: a view per role, whose methods the trainer calls.
Rollout engines are placed beside the student's ranks (``agent_loop``); a teacher in its own pool has its GPUs alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.config import TrainerConfig
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.single_controller.ray.base import RoleWorkerGroup
from verl.single_controller.ray.resource_pool import RankPlace, reserve_all

logger = logging.getLogger(__name__)

TRAIN, TEACHER = "train", "teacher"


@dataclass
class ResourcePoolManager:
    """The pools of a run, and the pool of each role."""

    resource_pool_spec: Mapping[str, Sequence[int]]
    """Ranks per node, by pool."""
    mapping: Mapping[str, str]
    """The pool of each role."""
    use_gpu: bool = True
    """One GPU per rank."""
    resource_pool_dict: dict[str, RayResourcePool] = field(default_factory=dict)
    """The pools, once created."""

    def create_resource_pool(self) -> None:
        """Reserve the places of all pools.

        Raises:
            ValueError: the cluster cannot hold them, or something else keeps what they need.
        """
        for name, ranks in self.resource_pool_spec.items():
            keys = "trainer.{0}n_gpus_per_node or trainer.{0}nnodes".format("teacher_" if name == TEACHER else "")
            self.resource_pool_dict[name] = RayResourcePool(ranks, self.use_gpu, name_prefix=name, settings=keys)
        reserve_all(list(self.resource_pool_dict.values()))

    def get_n_gpus(self) -> int:
        """Ranks of all pools: GPUs, or processes on CPU."""
        return sum(sum(ranks) for ranks in self.resource_pool_spec.values())

    def places(self, role: str) -> list[RankPlace]:
        """Where each rank of a role will run, in rank order; reserved already."""
        return self.resource_pool_dict[self.mapping[role]].reserve()

    def shutdown(self) -> None:
        """Give everything back, used or not; a second call does nothing."""
        for pool in self.resource_pool_dict.values():
            pool.remove()


def plan_pools(config: TrainerConfig, roles: Sequence[str], use_gpu: bool) -> ResourcePoolManager:
    """The pools that the settings ask for; nothing is reserved yet.

    Args:
        roles: ``actor``, then those of its frozen models.

    Raises:
        ValueError: a pool for a teacher that the run does not use.
    """
    train, teacher = config.ranks_on_nodes, config.teacher_ranks_on_nodes
    if not teacher:
        return ResourcePoolManager({TRAIN: train}, dict.fromkeys(roles, TRAIN), use_gpu)
    if len(roles) == 1:
        given = f"teacher_nnodes={config.teacher_nnodes}, teacher_n_gpus_per_node={config.teacher_n_gpus_per_node}"
        raise ValueError(f"trainer.{given}: this run uses no teacher; set both to null")
    mapping = {role: TRAIN if role == roles[0] else TEACHER for role in roles}
    return ResourcePoolManager({TRAIN: train, TEACHER: teacher}, mapping, use_gpu)


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
