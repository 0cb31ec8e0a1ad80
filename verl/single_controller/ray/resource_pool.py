"""The places a worker group's ranks run at: one placement group per pool, in it one bundle per node.

A bundle holds all of a node's ranks, and no two bundles of a pool share a node: ranks are packed, and a pool of two
nodes is on two machines. Pools may share nodes with each other, never GPUs. Ray waits without end for what no cluster
of its size can give, so whether it can is computed first. On the CPU a rank asks for a quarter of a CPU: ranks take
turns with the rollout engines, so Ray's CPU count only limits how many share a core.
"""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

CPUS_PER_PROCESS = 0.25
"""Default share of a CPU that a rank asks Ray for where it has no GPU: at most four ranks per CPU."""
WAIT_S = 120
"""Seconds to wait for resources that exist and are in use."""
LISTED_NODES = 16
"""Most nodes that an error lists."""


class ResourcesInUseError(RuntimeError):
    """The cluster has what a pool asks for, and something else keeps it."""


class NodeResources(NamedTuple):
    """What a node has, free or not."""

    address: str
    resources: Mapping[str, float]


class RankPlace(NamedTuple):
    """One rank's place; the ranks of a node share a bundle."""

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
        settings: str = "trainer.n_gpus_per_node or trainer.nnodes",
    ) -> None:
        """
        Args:
            process_on_nodes: ranks per node, each entry a node of its own.
            use_gpu: one GPU per rank.
            name_prefix: name of the pool in messages.
            max_colocate_count: worker groups that may share the pool, each rank taking that part of its share.
            cpus_per_process: CPUs per rank; None: 1 with a GPU, else ``CPUS_PER_PROCESS``.
            settings: the keys that a message tells the user to lower.
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
        self.settings = settings
        self.rank_share: dict[str, float] = {"CPU": cpus, "GPU": 1.0} if use_gpu else {"CPU": cpus}
        """What one rank asks for."""
        self._group: PlacementGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(self.process_on_nodes)

    def reserve(self) -> list[RankPlace]:
        """The ranks' places in rank order, kept until ``remove``; the same ones at every call.

        Raises:
            ValueError: the cluster is too small.
            ResourcesInUseError: the resources exist and stay in use.
        """
        if self._group is None:
            check_capacity([self], alive_nodes())
            shares = [
                {kind: amount * count for kind, amount in self.rank_share.items()} for count in self.process_on_nodes
            ]
            group = placement_group(shares, strategy="STRICT_SPREAD")
            if not group.wait(WAIT_S):
                remove_placement_group(group)
                raise ResourcesInUseError(
                    f"{self.name_prefix!r} waited {WAIT_S} s for {self.describe()}; free in the cluster now: "
                    f"{_describe(ray.available_resources())}. End what holds the rest, or lower {self.settings}"
                )
            self._group = group
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        in_order = sorted(nodes, key=lambda bundle: ip_address(addresses[nodes[bundle]]))
        return [
            RankPlace(self._group, bundle, nodes[bundle], addresses[nodes[bundle]])
            for bundle in in_order
            for _ in range(self.process_on_nodes[bundle])
        ]

    def remove(self) -> None:
        """Give the resources back; nothing happens where none are reserved."""
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
        self._group = None

    def describe(self) -> str:
        """What the pool asks for, in words."""
        first, nodes = self.process_on_nodes[0], len(self.process_on_nodes)
        ranks = first if set(self.process_on_nodes) == {first} else self.process_on_nodes
        on = "one node" if nodes == 1 else f"each of {nodes} nodes"
        return f"{ranks} process{'' if ranks == 1 else 'es'} of {_describe(self.rank_share)} on {on}"


def reserve_all(pools: Sequence[RayResourcePool]) -> None:
    """Reserve the places of all pools, or of none where the cluster cannot hold them all; see ``reserve``."""
    check_capacity(pools, alive_nodes())
    for pool in _largest_first(pools):
        pool.reserve()


def alive_nodes() -> list[NodeResources]:
    """The cluster's nodes."""
    return [NodeResources(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def check_capacity(pools: Sequence[RayResourcePool], nodes: Sequence[NodeResources]) -> None:
    """Raise ValueError, with what is asked for and what there is, where the nodes cannot hold all pools at once.

    The pools with the most ranks on a node choose first, and take the node that holds the most of their ranks.
    """
    left = [dict(node.resources) for node in nodes]
    held: list[RayResourcePool] = []
    for pool in _largest_first(pools):
        unused = list(range(len(nodes)))
        for count in sorted(pool.process_on_nodes, reverse=True):
            largest = max(unused, key=lambda node: _slots(left[node], pool.rank_share), default=None)
            if largest is None or _slots(left[largest], pool.rank_share) < count:
                raise ValueError(_does_not_fit(pool, held, nodes))
            unused.remove(largest)
            for kind, amount in pool.rank_share.items():
                left[largest][kind] -= amount * count
        held.append(pool)


def _largest_first(pools: Sequence[RayResourcePool]) -> list[RayResourcePool]:
    """The order in which pools are reserved: a small one must not break up the nodes that a large one needs."""
    return sorted(pools, key=lambda pool: max(pool.process_on_nodes), reverse=True)


def _slots(resources: Mapping[str, float], rank_share: Mapping[str, float]) -> int:
    """The ranks that a node has resources for."""
    # The small term lets fractions such as 0.1 fill a CPU in spite of rounding.
    return int(min(resources.get(kind, 0.0) / amount for kind, amount in rank_share.items() if amount) + 1e-6)


def _does_not_fit(pool: RayResourcePool, held: Sequence[RayResourcePool], nodes: Sequence[NodeResources]) -> str:
    have = "; ".join(f"node {node.address}: {_describe(node.resources)}" for node in nodes[:LISTED_NODES])
    more = f"; and {len(nodes) - LISTED_NODES} more" if len(nodes) > LISTED_NODES else ""
    beside = "".join(f", beside {other.name_prefix!r} with {other.describe()}" for other in held)
    return (
        f"{pool.name_prefix!r} asks for {pool.describe()}{beside}; the cluster has {have or 'no node'}{more}. "
        f"Lower {pool.settings}, or add machines"
    )


def _describe(resources: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind} {resources.get(kind, 0.0):g}" for kind in ("CPU", "GPU"))
