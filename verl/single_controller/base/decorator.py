"""How one call on a worker group becomes one call per rank, and the ranks' results become one result.

``register`` marks a worker's method with how its arguments and results travel. A ``WorkerGroup``, the driver's handle
on all ranks of a role, has the marked methods, and its ``begin`` carries the mark out. How a call reaches a rank is a
subclass's part.

    group.method(batch) ── begin ──► rank 0: method(rows 0..k)  ──┐
                                     rank 1: method(rows k..2k) ──┴─ collect ──► one DataProto
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from verl.protocol import DataProto, merge_meta_info

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "_verl_registration"


class WorkerError(RuntimeError):
    """A worker raised or died. The first line has role, method, rank, node and cause, the second where its log is."""

    def __init__(self, message: str, *, by_user: bool = False) -> None:
        """``by_user``: it raised a ValueError, so the same again would end the same."""
        super().__init__(message)
        self.by_user = by_user


class RolloutError(WorkerError):
    """An engine or an agent-loop worker failed; the message names it, the cause and its log."""


class Dispatch(Enum):
    """How the arguments of a call reach the ranks, and what the caller gets back."""

    ONE_TO_ALL = "one_to_all"
    """Every rank gets the same arguments; a list of results, by rank, comes back."""
    DP_COMPUTE_PROTO = "dp_compute_proto"
    """Each rank gets its share of the rows of every ``DataProto``, and other arguments as they are; the ``DataProto``
    results come back as one."""


class Execute(Enum):
    """Which ranks run a method."""

    ALL = "all"
    RANK_ZERO = "rank_zero"
    """Rank 0 alone; its result comes back."""


class Registration(NamedTuple):
    """The arguments of ``register``."""

    dispatch_mode: Dispatch
    execute_mode: Execute
    padding: bool = True
    reads: Sequence[str] | None = None
    blocking: bool = True


class Call(NamedTuple):
    """The arguments of one rank's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Results = Iterable[tuple[int, Any]]
"""Ranks and their results, in the order in which they come."""
Collect = Callable[[Results], Any]


def register(
    dispatch_mode: Dispatch = Dispatch.ONE_TO_ALL,
    execute_mode: Execute = Execute.ALL,
    padding: bool = True,
    reads: Sequence[str] | None = None,
    blocking: bool = True,
) -> Callable[[F], F]:
    """Make a worker's method callable on its group.

    Args:
        dispatch_mode: how arguments are split and results joined.
        execute_mode: with ``ONE_TO_ALL``, ``RANK_ZERO`` runs the method on rank 0 only.
        padding: with ``DP_COMPUTE_PROTO``, repeat rows where they do not divide over the ranks and drop their results.
            False raises ValueError instead: for methods where a repeated row would count twice.
        reads: with ``DP_COMPUTE_PROTO``, the batch keys that the method reads where they are there; no others travel.
            None: all.
        blocking: False: the group's method begins the call and returns a function, which waits for the result.
    """

    def mark(method: F) -> F:
        setattr(method, _ATTRIBUTE, Registration(dispatch_mode, execute_mode, padding, reads, blocking))
        return method

    return mark


def registered_methods(worker_class: type) -> dict[str, Registration]:
    """The registered methods of a class by name; an override keeps the registration of what it overrides."""
    return {
        name: getattr(member, _ATTRIBUTE)
        # From the base down: an override without a mark of its own leaves its parent's in place.
        for parent in reversed(worker_class.__mro__)
        for name, member in vars(parent).items()
        if hasattr(member, _ATTRIBUTE)
    }


class Begun(partial[Any]):
    """A call that was begun; calling it waits for the result."""

    def check(self) -> None:
        """Raise ``WorkerError`` where a rank of a group on Ray has failed; returns at once."""
        self.args[0].check()


class WorkerGroup(ABC):
    """Runs a worker class's registered methods on all its ranks."""

    def __init__(self, worker_class: type, world_size: int, ranks_per_share: int = 1) -> None:
        """
        Args:
            ranks_per_share: consecutive ranks that get the same rows and give the same result.
        """
        self._registrations, self._ranks_per_share = registered_methods(worker_class), ranks_per_share
        self.world_size = world_size
        """Number of ranks."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # The underscore first: before __init__ has run, reading _registrations would come back here without end.
        if name.startswith("_") or name not in self._registrations:
            raise AttributeError(f"{type(self).__name__} has no registered method {name!r}")
        return partial(self._run, name)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        wait = self.begin(method, *args, **kwargs)
        return wait() if self._registrations[method].blocking else wait

    def begin(self, method: str, *args: Any, **kwargs: Any) -> Begun:
        """Begin a call of a registered method; what it returns waits for the result. Ranks keep the order of calls."""
        registration = self._registrations[method]
        if registration.dispatch_mode is Dispatch.DP_COMPUTE_PROTO:
            calls, collect = self._split_rows(method, registration, args, kwargs)
        elif registration.execute_mode is Execute.RANK_ZERO:
            calls, collect = [Call(args, kwargs)], lambda results: by_rank(results)[0]
        else:
            calls, collect = [Call(args, kwargs)] * self.world_size, by_rank
        return Begun(collect, self._results(method, calls))

    def _split_rows(
        self, method: str, registration: Registration, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Call], Collect]:
        """The ranks' calls, and the function that joins their results; raises ValueError for rows that do not fit."""
        per_share, shares = self._ranks_per_share, self.world_size // self._ranks_per_share
        values = [*args, *kwargs.values()]
        sizes = sorted({len(value) for value in values if isinstance(value, DataProto)}) or [0]
        if len(sizes) > 1:
            raise ValueError(f"{method} got batches of {' and '.join(map(str, sizes))} rows; they must be equally long")
        rows = sizes[0]
        if rows % shares and not registration.padding:
            ranks = f"{shares} ranks" if per_share == 1 else f"{shares} groups of {per_share} ranks"
            raise ValueError(f"{method} got {rows} rows for {ranks}; use a batch size that is a multiple of {shares}")
        runs = [_row_runs(value, registration.reads, shares) for value in values]
        calls = []
        for _, *own in zip(range(shares), *runs, strict=True):
            call = Call(tuple(own[: len(args)]), dict(zip(kwargs, own[len(args) :], strict=True)))
            calls += [call] * per_share
        return calls, lambda results: _join_rows(method, results, rows, -(-rows // shares), per_share)

    @abstractmethod
    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        """Run call i on rank i: ranks and results as they come, none kept here; raises ``WorkerError``."""


def by_rank(results: Results) -> list[Any]:
    """The results of ranks 0, 1, ..."""
    return [result for _, result in sorted(results, key=lambda item: item[0])]


def _row_runs(data: Any, reads: Sequence[str] | None, shares: int) -> list[Any]:
    """Each share of an argument: the chunks of ``pad_dataproto_to_divisor``'s batch, or the same value for all.

    That batch is never made: only the last runs are copies.
    """
    if not isinstance(data, DataProto):
        return [data] * shares
    if reads is not None:
        tensors = [key for key in reads if data.batch is not None and key in data.batch]
        data = data.select(tensors, [key for key in reads if key in data.non_tensor_batch])
    rows = len(data)
    share = -(-rows // shares)
    bounds = [(number * share, (number + 1) * share) for number in range(shares)]
    return [
        # Modulo, for with fewer rows than ranks a row is repeated more than once.
        data.slice(start, end) if end <= rows else data.select_idxs(np.arange(start, end) % rows)
        for start, end in bounds
    ]


def _join_rows(method: str, results: Results, rows: int, share: int, ranks_per_share: int) -> Any:
    """One ``DataProto`` of all ranks' rows without the padding; each rank's is freed as soon as it is copied.

    Results without rows, such as metrics alone, are joined by ``DataProto.concat``; results of other types come back as
    a list.
    """
    buffer, others = RowBuffer(rows), dict[int, Any]()
    for rank, result in results:
        number, is_copy = divmod(rank, ranks_per_share)
        if is_copy:
            pass
        elif isinstance(result, DataProto) and 0 < len(result) == share:
            buffer.put(number * share, result)
        else:
            others[rank] = result
        del result  # before the next one comes
    if not others:
        return buffer.take()
    values = by_rank(others.items())
    if not buffer.is_empty or any(isinstance(value, DataProto) and len(value) for value in values):
        raise ValueError(
            f"{method} must return {share} rows on every rank, or none on any; ranks {sorted(others)} did not"
        )
    return DataProto.concat(values) if all(isinstance(value, DataProto) for value in values) else values


class RowBuffer:
    """A batch of a known number of rows, filled part by part, in any order, without a second copy of them.

    The whole is allocated when the first part shows its columns; each part is copied into place, and its sender can
    free it. Joining all parts at the end instead would hold every row twice, and the memory of many small parts would
    not go back to the system.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._filled = 0
        self._tensors: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._meta_info: dict[int, dict[str, Any]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no part has come yet."""
        return not self._meta_info

    def put(self, start: int, part: DataProto) -> None:
        """Copy ``part`` to rows ``start`` and on; rows past the last one are left out.

        Raises:
            ValueError: its columns are not those of the first part.
        """
        tensors = {} if part.batch is None else dict(part.batch.items())
        if self.is_empty:
            self._tensors = {key: value.new_empty((self._rows, *value.shape[1:])) for key, value in tensors.items()}
            self._arrays = {key: np.empty(self._rows, dtype=object) for key in part.non_tensor_batch}
        whole, columns = self._tensors | self._arrays, tensors | part.non_tensor_batch
        if differing := whole.keys() ^ columns.keys():
            raise ValueError(f"rows can only be joined with the same keys; not in all: {', '.join(sorted(differing))}")
        count = max(0, min(len(part), self._rows - start))
        for key, values in columns.items():
            whole[key][start : start + count] = values[:count]
        self._meta_info[start] = part.meta_info
        self._filled += count

    def take(self) -> DataProto:
        """All rows; ``meta_info`` is joined as ``DataProto.concat`` does.

        Raises:
            ValueError: rows are missing, or the parts' ``meta_info`` contradict each other.
        """
        if self._filled != self._rows:
            raise ValueError(f"{self._filled} of {self._rows} rows have come")
        meta_info = merge_meta_info([self._meta_info[start] for start in sorted(self._meta_info)])
        return DataProto.from_dict(self._tensors, self._arrays, meta_info)
