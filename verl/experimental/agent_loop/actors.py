"""Places replicas and agent-loop workers, and makes them Ray actors or objects of this process.

In: one placement per rank of the student, as ``Worker.get_placement`` gives it; a class and its arguments. Out: one
``ReplicaPlace`` per replica; a handle. Replicas share these ranks' devices and nodes, so they ask Ray for nothing: a
node and, on CUDA, device ids. Ranks of other pools, such as a teacher's, do not come in: their GPUs are their own.

Both kinds of handles are called alike: ``handle.actor.method.remote(...)`` begins a call, and ``as_they_come`` yields
the results of calls.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.local import LocalActor
from verl.single_controller.ray.calls import Remote, as_they_come

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""Seconds that all replicas have together to end by themselves."""


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
    """
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for placement in sorted(placements, key=lambda placement: placement["rank"]):
        nodes.setdefault(placement["node_id"], []).append(placement)
    places: list[ReplicaPlace] = []
    for node_id, ranks in nodes.items():
        size = len(ranks) if device == "cpu" else gpus_per_replica
        for first in range(0, len(ranks), size):
            beside = ranks[first : first + size]
            numbers = tuple(rank["rank"] for rank in beside)
            gpus = None if device == "cpu" else ",".join(map(_gpu_of, beside))
            places.append(ReplicaPlace(len(places), node_id, beside[0]["node_ip"], gpus, numbers))
    return places


def _gpu_of(rank: Mapping[str, Any]) -> str:
    # Several ids: the rank sees all GPUs of its node and uses the one of its local rank.
    devices: list[str] = rank["cuda_visible_devices"].split(",")
    return devices[0] if len(devices) == 1 else devices[rank["local_rank"]]


class RayActors:
    """Every object in a process of its own; an error names the process, the cause and its log."""

    as_they_come = staticmethod(as_they_come)

    def __init__(self) -> None:
        self.max_workers = int(ray.cluster_resources().get("CPU", 1))
        """As many as the cluster has CPUs."""

    def create(
        self, name: str, place: ReplicaPlace, made_class: type, *arguments: Any, gpus: str | None = None
    ) -> Remote:
        """An actor on the node of ``place`` that sees ``gpus`` (device ids)."""
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
        if gpus is not None:
            # The GPUs belong to the training ranks; without the second entry Ray could hide them from the actor.
            visible = {"CUDA_VISIBLE_DEVICES": gpus, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options["runtime_env"] = {"env_vars": visible}
        on_node = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        actor_class = ray.remote(made_class).options(scheduling_strategy=on_node, **options)
        actor = Remote(name, actor_class.remote(*arguments), place.node_ip)
        actor.ask_for_log()
        return actor

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Let the replicas end by themselves, then kill everything."""
        calls = {replica.actor.shutdown.remote(): replica for replica in replicas}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=SHUTDOWN_S) if calls else ([], [])
        for call in done:
            try:
                ray.get(call)
            except RayError as error:
                # A run often ends because one is dead, which was reported.
                level = logging.DEBUG if isinstance(error, RayActorError) else logging.WARNING
                logger.log(level, "%s failed to shut down: %s", calls[call].name, error)
        for call in late:
            logger.warning("%s did not shut down within %.0f s and is killed", calls[call].name, SHUTDOWN_S)
        for remote in (*workers, *replicas):
            ray.kill(remote.actor)


class LocalActors:
    """Every object in this process, on one event loop that runs while calls are waited for; an error is the object's
    own. On CPU alone: on a GPU, engine and training would have to take turns with its memory.
    """

    max_workers = 1

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def create(
        self, name: str, place: ReplicaPlace, made_class: type, *arguments: Any, gpus: str | None = None
    ) -> Remote:
        """An object of this process; there are no ``gpus``."""
        return Remote(name, LocalActor(made_class(*arguments), self._loop), place.node_ip)

    def as_they_come(self, calls: Mapping[Any, Remote], doing: str, **options: Any) -> Iterator[tuple[int, Any]]:
        """Numbers and results of the calls; the first to fail ends the wait with its own error."""
        for number, call in enumerate(calls):
            # The loop runs all calls meanwhile, whichever is waited for.
            yield number, self._loop.run_until_complete(call)

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Stop what still runs, then the engines."""
        # They end while the loop runs the shutdowns below.
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        for replica in replicas:
            self._loop.run_until_complete(replica.actor.shutdown.remote())
        self._loop.close()
