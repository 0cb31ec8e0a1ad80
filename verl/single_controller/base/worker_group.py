"""The driver's handle on all ranks of a role: registered methods of the worker class are callable on the group.

Splitting arguments and joining results is ``decorator``'s part; a subclass decides how calls reach the ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from verl.single_controller.base.decorator import Call, Results, plan_calls, registered_methods


class WorkerError(RuntimeError):
    """A worker raised or died. The first line has role, method, rank, node and cause, the second where its log is."""

    def __init__(self, message: str, *, by_user: bool = False) -> None:
        """``by_user``: it raised a ValueError, so the same again would end the same."""
        super().__init__(message)
        self.by_user = by_user


class RolloutError(WorkerError):
    """An engine or an agent-loop worker failed; the message names it, the cause and its log."""


class WorkerGroup(ABC):
    """Runs a worker class's registered methods on all its ranks."""

    def __init__(self, worker_class: type, world_size: int) -> None:
        self._registrations = registered_methods(worker_class)
        self._worker_class = worker_class
        self.world_size = world_size
        """Number of ranks."""
        hidden = [name for name in self._registrations if hasattr(type(self), name) and name != "get_placement"]
        if hidden:
            raise ValueError(f"{worker_class.__name__} registers {hidden}, which a group has itself; rename them")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._registrations:
            known = ", ".join(sorted(self._registrations))
            raise AttributeError(f"{self._worker_class.__name__} has no registered method {name!r}; it has: {known}")
        return partial(self._run, name)

    def get_placement(self) -> list[dict[str, Any]]:
        """Where each rank runs; see ``Worker.get_placement``."""
        return self._run("get_placement")

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        calls, collect = plan_calls(method, self._registrations[method], self.world_size, args, kwargs)
        return collect(self._finish(method, self._start(method, calls)))

    @abstractmethod
    def _start(self, method: str, calls: Sequence[Call]) -> Any:
        """Begin call i on rank i, and return what ``_finish`` waits for."""

    @abstractmethod
    def _finish(self, method: str, running: Any) -> Results:
        """Ranks and results as they come, none kept here; raises ``WorkerError``."""
