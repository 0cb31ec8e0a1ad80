"""The places a worker group's ranks run at: one placement group per node, one bundle per rank.

Whether the cluster can hold them at all is checked before anything waits. On the CPU a bundle asks for a quarter of a
CPU: ranks take turns with the rollout engines, so Ray's CPU count only limits how many share a core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

CPUS_PER_PROCESS = 0.25
"""Default share of a CPU that a rank asks Ray for where it has no GPU: at most four ranks per CPU."""
WAIT_S = 120
"""Seconds to wait for resources that exist and are in use."""


@dataclass(frozen=True)
class NodeResources:
    """What a node has."""

    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class RankPlace:
    """One rank's place."""

    group: PlacementGroup
    bundle_index: int
    node_id: str
    node_ip: str


class RayResourcePool:
    """Resources for ``sum(process_on_nodes)`` ranks, reserved when the first worker group asks for them.

    Ranks are numbered over the nodes in the order of their addresses, so that a restart finds its files again.
    """

    def __init__(
        self,
        process_on_nodes: Sequence[int],
        use_gpu: bool = True,
        name_prefix: str = "pool",
        max_colocate_count: int = 1,
        cpus_per_process: float | None = None,
    ) -> None:
        """
        Args:
            process_on_nodes: ranks per node.
            use_gpu: one GPU per rank.
            name_prefix: what the pool is called in messages.
            max_colocate_count: worker groups that share the pool, each rank taking that part of its bundle.
            cpus_per_process: CPUs per rank; None: 1 with a GPU, else ``CPUS_PER_PROCESS``.
        """
        if not process_on_nodes or min(process_on_nodes) < 1 or max_colocate_count < 1:
            raise ValueError(
                f"process_on_nodes={list(process_on_nodes)} and max_colocate_count={max_colocate_count} must be "
                "at least 1"
            )
        cpus = cpus_per_process if cpus_per_process is not None else 1.0 if use_gpu else CPUS_PER_PROCESS
        self.process_on_nodes = list(process_on_nodes)
        self.name_prefix = name_prefix
        self.max_colocate_count = max_colocate_count
        self.bundle: dict[str, float] = {"CPU": cpus, "GPU": 1.0} if use_gpu else {"CPU": cpus}
        self._groups: list[PlacementGroup] = []
        self._users = 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(self.process_on_nodes)

    def acquire(self) -> list[RankPlace]:
        """The ranks' places in rank order; every ``acquire`` needs a ``release``.

        Raises:
            ValueError: the cluster is too small, or too many worker groups share the pool.
            RuntimeError: the resources exist and stay in use.
        """
        if self._users == self.max_colocate_count:
            raise ValueError(
                f"{self.name_prefix!r} holds {self._users} worker groups already; raise max_colocate_count"
            )
        if not self._groups:
            nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            check_capacity(
                self.name_prefix,
                self.process_on_nodes,
                self.bundle,
                [NodeResources(node["NodeManagerAddress"], node["Resources"]) for node in nodes.values()],
            )
            self._groups = self._reserve()
        self._users += 1
        return self._places()

    def release(self) -> None:
        """Give the resources back when the last worker group has."""
        self._users -= 1
        if self._users == 0:
            self._remove()

    def _reserve(self) -> list[PlacementGroup]:
        self._groups = [
            placement_group([dict(self.bundle)] * count, strategy="STRICT_PACK") for count in self.process_on_nodes
        ]
        if not all(group.wait(WAIT_S) for group in self._groups):
            self._remove()
            raise RuntimeError(
                f"{self.name_prefix!r} waited {WAIT_S} s for {self.process_on_nodes} x {_describe(self.bundle)}; "
                f"free in the cluster now: {_describe(ray.available_resources())}. End what holds the rest"
            )
        return self._groups

    def _remove(self) -> None:
        if ray.is_initialized():
            for group in self._groups:
                remove_placement_group(group)
        self._groups = []

    def _places(self) -> list[RankPlace]:
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        located = [(placement_group_table(group)["bundles_to_node_id"][0], group) for group in self._groups]
        located.sort(key=lambda entry: ip_address(addresses[entry[0]]))
        return [
            RankPlace(group, index, node_id, addresses[node_id])
            for node_id, group in located
            for index in range(group.bundle_count)
        ]


def check_capacity(
    name: str, process_on_nodes: Sequence[int], bundle: Mapping[str, float], nodes: Sequence[NodeResources]
) -> None:
    """Raise ValueError, with what is asked for and what there is, where the nodes cannot hold the pool.

    Args:
        process_on_nodes: ranks of each part; a part's ranks share one node.
        bundle: what one rank asks for.
        nodes: what there is in all, free or not.
    """
    # The small term lets fractions such as 0.1 fill a CPU in spite of rounding.
    slots = [
        int(min(node.resources.get(kind, 0.0) / amount for kind, amount in bundle.items() if amount) + 1e-6)
        for node in nodes
    ] or [0]
    for count in sorted(process_on_nodes, reverse=True):
        roomiest = max(range(len(slots)), key=slots.__getitem__)
        if slots[roomiest] < count:
            have = "; ".join(f"node {node.address}: {_describe(node.resources)}" for node in nodes)
            raise ValueError(
                f"{name!r} asks for {list(process_on_nodes)} processes (per node) of {_describe(bundle)} each; the "
                f"cluster has {have or 'no node'}. Lower trainer.n_gpus_per_node or trainer.nnodes, or add machines"
            )
        slots[roomiest] -= count


def _describe(resources: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind} {resources.get(kind, 0.0):g}" for kind in ("CPU", "GPU"))
