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
"""Share of a CPU that a rank asks Ray for where it has no GPU: at most four ranks per CPU."""
WAIT_S = 120
"""Seconds to wait for resources that exist and are in use."""


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
        settings: str = "trainer.n_gpus_per_node or trainer.nnodes",
    ) -> None:
        """
        Args:
            process_on_nodes: ranks per node, each entry a node of its own.
            use_gpu: one GPU per rank.
            name_prefix: name of the pool in messages.
            max_colocate_count: worker groups that may share the pool, each rank taking that part of its share.
            settings: the keys that a message tells the user to lower.
        """
        self.process_on_nodes = list(process_on_nodes)
        self.name_prefix = name_prefix
        self.max_colocate_count = max_colocate_count
        self.settings = settings
        self.use_gpu = use_gpu
        """May change until the pool is reserved."""
        self._group: PlacementGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(self.process_on_nodes)

    @property
    def rank_share(self) -> dict[str, float]:
        """What one rank asks for."""
        return {"CPU": 1.0, "GPU": 1.0} if self.use_gpu else {"CPU": CPUS_PER_PROCESS}

    def reserve(self) -> list[RankPlace]:
        """The ranks' places in rank order, kept until ``remove``; the same ones at every call.

        Raises:
            ValueError: the cluster is too small, or something else keeps what it has.
        """
        if self._group is None:
            check_capacity([self], ray.nodes())
            group = placement_group(
                [{kind: amount * count for kind, amount in self.rank_share.items()} for count in self.process_on_nodes],
                strategy="STRICT_SPREAD",
            )
            if not group.wait(WAIT_S):
                # Else it goes on waiting in Ray, and takes the resources once they are free.
                remove_placement_group(group)
                free = _describe(ray.available_resources())
                asks = f"{self.name_prefix!r} waited {WAIT_S} s for {self.describe()}; free in the cluster now: {free}"
                raise ValueError(f"{asks}. End what holds the rest, or lower {self.settings}")
            self._group = group
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        # As numbers: as texts, 10.0.0.10 would come before 10.0.0.9.
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
        nodes = len(self.process_on_nodes)
        return f"{self.world_size} rank(s) on {nodes} node(s), {_describe(self.rank_share)} each"

    def slots(self, node: Mapping[str, float]) -> int:
        """The ranks that a node with these resources can hold."""
        # The small term lets fractions fill a CPU in spite of rounding.
        return int(min(node.get(kind, 0.0) / amount for kind, amount in self.rank_share.items()) + 1e-6)


def reserve_all(pools: Sequence[RayResourcePool]) -> None:
    """Check that the cluster can hold all pools at once, then reserve each; raises as ``reserve``."""
    check_capacity(pools, ray.nodes())
    for pool in _largest_first(pools):
        pool.reserve()


def check_capacity(pools: Sequence[RayResourcePool], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError, with what is asked for and what there is, where the nodes cannot hold all pools at once.

    The pools with the most ranks on a node choose first, and take the nodes that hold the most of their ranks.

    Args:
        nodes: as ``ray.nodes()`` lists them.
    """
    nodes = [node for node in nodes if node["Alive"]]
    left = [dict(node["Resources"]) for node in nodes]
    for pool in _largest_first(pools):
        largest = sorted(left, key=pool.slots, reverse=True)
        counts = sorted(pool.process_on_nodes, reverse=True)
        pairs = list(zip(largest, counts, strict=False))
        if len(pairs) < len(counts) or any(pool.slots(node) < count for node, count in pairs):
            beside = "".join(f", beside {other.name_prefix!r}: {other.describe()}" for other in pools if other != pool)
            have = "; ".join(f"node {node['NodeManagerAddress']}: {_describe(node['Resources'])}" for node in nodes)
            raise ValueError(
                f"{pool.name_prefix!r} asks for {pool.describe()}{beside}; the cluster has {have or 'no node'}. "
                f"Lower {pool.settings}, or add machines (init_ray_cluster.sh HOSTFILE starts a cluster, which "
                "ray_kwargs.ray_init.address=auto joins)"
            )
        for node, count in pairs:
            for kind, amount in pool.rank_share.items():
                # The node is one of `left`, so the next pool sees what remains.
                node[kind] -= amount * count


def _largest_first(pools: Sequence[RayResourcePool]) -> list[RayResourcePool]:
    """The order in which pools are reserved: a small one must not break up the nodes that a large one needs."""
    return sorted(pools, key=lambda pool: max(pool.process_on_nodes), reverse=True)


def _describe(resources: Mapping[str, Any]) -> str:
    # Not "GPU 0", which could be the name of one.
    amounts = {kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {kind}" if amount else f"no {kind}" for kind, amount in amounts.items())
