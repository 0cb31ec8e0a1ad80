"""What Ray does for a run, done in the calling process, for studies of small models and for tests.

In: workers by role. Out: a worker group per role, called as a Ray group is; arguments are split and results joined by
the same code, for one rank. A call runs at once, and an error is the worker's own. ``LocalActor`` stands in for the
handle of a Ray actor in the same way.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Call, Results, WorkerGroup


class LocalWorkerGroup(WorkerGroup):
    """One worker, rank 0 of 1, in this process."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(type(worker), world_size=1)
        self._worker = worker

    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        return [(rank, getattr(self._worker, method)(*call.args, **call.kwargs)) for rank, call in enumerate(calls)]


def local_groups(workers: Mapping[str, Worker]) -> dict[str, LocalWorkerGroup]:
    """A group per role; the workers know each other as the roles of one process do."""
    for worker in workers.values():
        # Each keeps its own store: handles are functions here, which any store of the process can call.
        worker.attach(workers, worker.object_store)
    return {role: LocalWorkerGroup(worker) for role, worker in workers.items()}


class LocalActor:
    """An object called as a Ray actor is: ``actor.method.remote(...)`` begins an async method on the event loop."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, method: str) -> Any:
        function = getattr(self._target, method)
        # A task runs as soon as the loop does, as a Ray call begins by itself; a bare coroutine waits for its await.
        return SimpleNamespace(remote=lambda *arguments: self._loop.create_task(function(*arguments)))
