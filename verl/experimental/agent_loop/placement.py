"""Where rollout replicas go, and which part of a weight sync each of them reads.

In: one placement per training rank, as ``Worker.get_placement`` gives it. Out: one ``ReplicaPlace`` per replica.
Replicas share the training ranks' devices and nodes, so they ask Ray for nothing: a node and, on CUDA, device ids.
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
        if device == "cpu":
            places.append(ReplicaPlace(len(places), node_id, ranks[0]["node_ip"], None))
            continue
        if len(ranks) % gpus_per_replica:
            raise ValueError(
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={gpus_per_replica} does not divide the "
                f"{len(ranks)} GPUs of node {ranks[0]['node_ip']} (trainer.n_gpus_per_node)"
            )
        for first in range(0, len(ranks), gpus_per_replica):
            devices = ",".join(_gpu_of(rank) for rank in ranks[first : first + gpus_per_replica])
            places.append(ReplicaPlace(len(places), node_id, ranks[0]["node_ip"], devices))
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


def bucket_for(
    place: ReplicaPlace, placements: Sequence[Mapping[str, Any]], infos: Sequence[dict[str, Any] | None], device: str
) -> dict[str, Any]:
    """What ``place``'s replica reads one weight bucket from, out of what the ranks exported.

    On CPU a bucket lies in the shared memory of each node, on CUDA rank 0 names every rank's device memory.

    Args:
        infos: per rank, its export or None.

    Raises:
        ValueError: no rank exported a bucket for this replica.
    """
    if device == "cuda":
        fitting = [infos[0]]
    else:
        fitting = [info for info, rank in zip(infos, placements, strict=True) if rank["node_id"] == place.node_id]
    found = [info for info in fitting if info is not None]
    if not found:
        raise ValueError(f"no training rank exported the weights for node {place.node_ip} ({len(infos)} ranks asked)")
    return found[0]
