"""Where replicas and agent-loop workers run: as Ray actors on the cluster's nodes, or as objects of this process.

In: a class and its arguments. Out: a handle. Both kinds are called alike: ``handle.actor.method.remote(...)`` begins a
call, and ``as_they_come`` yields the results of calls.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.experimental.agent_loop.placement import ReplicaPlace
from verl.single_controller.local import LocalActor
from verl.single_controller.ray.calls import Remote, as_they_come

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""Seconds that all replicas have together to end by themselves."""


class CheckedActor(Remote):
    """An actor with a ``check_alive`` of its own: a replica looks at the processes of its engine too."""

    def _ask_for_sign(self) -> Any:
        return self.actor.check_alive.remote()


class RayActors:
    """Every object in a process of its own; an error names the process, the cause and its log."""

    share = staticmethod(ray.put)
    as_they_come = staticmethod(as_they_come)

    @property
    def max_workers(self) -> int:
        """Workers that the cluster has CPUs for."""
        return int(ray.cluster_resources().get("CPU", 1))

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
        actor = CheckedActor(name, actor_class.remote(*arguments), place.node_ip)
        actor.ask_for_log()
        return actor

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Let the replicas end by themselves, then kill everything."""
        calls = {replica.actor.shutdown.remote(): replica for replica in replicas}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=SHUTDOWN_S) if calls else ([], [])
        for call in done:
            try:
                ray.get(call)
            except RayActorError:
                logger.debug("%s was dead before it could be shut down", calls[call].name)
            except RayError as error:
                account = calls[call].account_of(error, calls[call].log())
                logger.warning("%s failed to shut down: %s", calls[call].name, account)
        for call in late:
            logger.warning("%s did not shut down within %.0f s and is killed", calls[call].name, SHUTDOWN_S)
        for remote in (*workers, *replicas):
            ray.kill(remote.actor)


class LocalHandle(Remote):
    """An object of this process, which lives as long as its caller."""

    def check_alive(self) -> None:
        """Never raises."""


class LocalActors:
    """Every object in this process, on one event loop that runs while calls are waited for; an error is the object's
    own. On CPU alone: on a GPU, engine and training would have to take turns with its memory.
    """

    max_workers = 1

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def create(
        self, name: str, place: ReplicaPlace, made_class: type, *arguments: Any, gpus: str | None = None
    ) -> Remote:
        """An object of this process; there are no ``gpus``."""
        return LocalHandle(name, LocalActor(made_class(*arguments), self._loop), place.node_ip)

    def as_they_come(self, calls: Mapping[Any, Remote], doing: str, **options: Any) -> Iterator[tuple[int, Any]]:
        """Numbers and results of the calls; the first to fail ends the wait with its own error."""
        for number, call in enumerate(calls):
            yield number, self._loop.run_until_complete(call)

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Stop what still runs, then the engines."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        for replica in replicas:
            self._loop.run_until_complete(replica.actor.shutdown.remote())
        self._loop.close()
