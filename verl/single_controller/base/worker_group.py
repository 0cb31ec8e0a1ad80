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
        self.world_size = world_size
        """Number of ranks."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # The underscore first: before __init__ has run, reading _registrations would come back here without end.
        if name.startswith("_") or name not in self._registrations:
            raise AttributeError(f"{type(self).__name__} has no registered method {name!r}")
        return partial(self._run, name)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        calls, collect = plan_calls(method, self._registrations[method], self.world_size, args, kwargs)
        return collect(self._results(method, calls))

    @abstractmethod
    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        """Run call i on rank i: ranks and results as they come, none kept here; raises ``WorkerError``."""
