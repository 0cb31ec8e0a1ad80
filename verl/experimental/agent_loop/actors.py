"""Where engines and agent-loop workers run: on which node and GPUs, and as Ray actors or in this process.

In: the student's ranks, or a pool of the engines' own. Out: places, and objects at them that are all called alike.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from verl.single_controller.ray.calls import Remote, as_they_come
from verl.single_controller.ray.resource_pool import RayResourcePool

logger = logging.getLogger(__name__)

SEES_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Ray's variable for leaving CUDA_VISIBLE_DEVICES of actors as it is."""

SHUTDOWN_S = 10.0
"""Seconds that all replicas have together to end by themselves."""


@dataclass(frozen=True)
class Place:
    """Node and GPUs of a replica, or of a teacher's server."""

    index: int
    node_id: str
    node_ip: str
    cuda_visible_devices: str | None
    """Comma-separated device ids of ranks; None on CPU, and where Ray gives it GPUs of its own."""
    ranks: tuple[int, ...]
    """The student's ranks beside it: on CUDA those whose GPUs it uses, on CPU all of the node. Empty in a pool."""
    share: Mapping[str, Any] = field(default_factory=dict)
    """Ray's options for a replica in a pool: what it takes of which bundle."""

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options for a replica."""
        if self.cuda_visible_devices is None:
            return dict(self.share)
        # The GPUs belong to the training ranks; without the second entry Ray could hide them from the actor.
        visible = {"CUDA_VISIBLE_DEVICES": self.cuda_visible_devices, SEES_ALL_GPUS: "1"}
        return {"runtime_env": {"env_vars": visible}}


def plan_replicas(
    placements: Sequence[Mapping[str, Any]], device: str, gpus_per_replica: int, cpu_engines: int = 1
) -> list[Place]:
    """On CPU ``cpu_engines`` replicas per node; on CUDA one per ``gpus_per_replica`` consecutive ranks of a node.

    Args:
        placements: per rank ``rank``, ``local_rank``, ``node_id``, ``node_ip``, ``cuda_visible_devices``.
        device: ``cpu`` or ``cuda``.
    """
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for placement in sorted(placements, key=lambda placement: placement["rank"]):
        nodes.setdefault(placement["node_id"], []).append(placement)
    places: list[Place] = []
    for node_id, ranks in nodes.items():
        neighbours = [ranks[first : first + gpus_per_replica] for first in range(0, len(ranks), gpus_per_replica)]
        for beside in [ranks] * cpu_engines if device == "cpu" else neighbours:
            numbers = tuple(rank["rank"] for rank in beside)
            gpus = None if device == "cpu" else ",".join(map(_gpu_of, beside))
            places.append(Place(len(places), node_id, beside[0]["node_ip"], gpus, numbers))
    return places


def plan_apart(pool: RayResourcePool, gpus_per_replica: int) -> list[Place]:
    """Replicas in a pool of their own, one per ``gpus_per_replica`` consecutive places of a node."""
    share = {kind: amount * gpus_per_replica for kind, amount in pool.rank_share.items()}
    options: dict[str, Any] = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0)}
    # Where the user has it set, an actor would see all GPUs of its node.
    options |= {"runtime_env": {"env_vars": {SEES_ALL_GPUS: "0"}}}
    places = []
    for index, place in enumerate(pool.reserve()[::gpus_per_replica]):
        in_bundle = PlacementGroupSchedulingStrategy(place.group, place.bundle_index)
        options_here = options | {"scheduling_strategy": in_bundle}
        places.append(Place(index, place.node_id, place.node_ip, None, (), options_here))
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

    def create(self, name: str, place: Place, made_class: type, *arguments: Any, **options: Any) -> Remote:
        """An actor on the node of ``place``; ``options`` are Ray's."""
        on_node = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        usual = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": on_node}
        actor_class = ray.remote(made_class).options(**{**usual, **options})
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


class LocalActor:
    """An object called as a Ray actor is: ``actor.method.remote(...)`` begins an async method on the event loop."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, method: str) -> Any:
        function = getattr(self._target, method)
        # A task runs as soon as the loop does, as a Ray call begins by itself; a bare coroutine waits for its await.
        return SimpleNamespace(remote=lambda *arguments: self._loop.create_task(function(*arguments)))


class LocalActors:
    """Every object in this process, on one event loop that runs while calls are waited for; an error is the object's
    own. On CPU alone: on a GPU, engine and training would have to take turns with its memory.
    """

    max_workers = 1

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def create(self, name: str, place: Place, made_class: type, *arguments: Any, **options: Any) -> Remote:
        """An object of this process; ``options`` are Ray's, and mean nothing here."""
        return Remote(name, LocalActor(made_class(*arguments), self._loop), place.node_ip)

    def as_they_come(self, calls: Mapping[Any, Remote], doing: str, **options: Any) -> Iterator[tuple[int, Any]]:
        """Numbers and results of the calls; the first failure ends the wait. ``options`` have no effect here."""
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
