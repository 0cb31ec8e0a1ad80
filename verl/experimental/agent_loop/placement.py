"""Where rollout replicas go.

In: one placement per rank of the student, as ``Worker.get_placement`` gives it. Out: one ``ReplicaPlace`` per replica.
Replicas share these ranks' devices and nodes, so they ask Ray for nothing: a node and, on CUDA, device ids. Ranks of
other pools, such as a teacher's, do not come in: their GPUs are their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReplicaPlace:
    """One replica's node and GPUs."""

    index: int
    node_id: str
    node_ip: str
    cuda_visible_devices: str | None
    """Comma-separated device ids; None on CPU."""
    ranks: tuple[int, ...]
    """The student's ranks beside it: on CUDA those whose GPUs it uses, on CPU all of the node."""


def plan_replicas(placements: Sequence[Mapping[str, Any]], device: str, gpus_per_replica: int) -> list[ReplicaPlace]:
    """On CPU one replica per node; on CUDA one per ``gpus_per_replica`` consecutive ranks of a node.

    Args:
        placements: per rank ``rank``, ``local_rank``, ``node_id``, ``node_ip``, ``cuda_visible_devices``.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: the ranks of a node do not divide into replicas, or a rank has no GPU.
    """
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for placement in sorted(placements, key=lambda placement: placement["rank"]):
        nodes.setdefault(placement["node_id"], []).append(placement)
    places: list[ReplicaPlace] = []
    for node_id, ranks in nodes.items():
        node_ip = ranks[0]["node_ip"]
        size = len(ranks) if device == "cpu" else gpus_per_replica
        if len(ranks) % size:
            raise ValueError(
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={gpus_per_replica} does not divide the "
                f"{len(ranks)} GPUs of node {node_ip} (trainer.n_gpus_per_node)"
            )
        for first in range(0, len(ranks), size):
            beside = ranks[first : first + size]
            devices = None if device == "cpu" else ",".join(_gpu_of(rank) for rank in beside)
            places.append(ReplicaPlace(len(places), node_id, node_ip, devices, tuple(rank["rank"] for rank in beside)))
    return places


def _gpu_of(rank: Mapping[str, Any]) -> str:
    devices = str(rank["cuda_visible_devices"] or "").split(",")
    if devices == [""]:
        raise ValueError(
            f"training rank {rank['rank']} on node {rank['node_ip']} has no GPU to share with a rollout replica; set "
            "trainer.device=cpu, or start Ray with the node's GPUs"
        )
    # Several ids: the rank sees all GPUs of its node and uses the one of its local rank.
    return devices[0] if len(devices) == 1 else devices[rank["local_rank"]]
