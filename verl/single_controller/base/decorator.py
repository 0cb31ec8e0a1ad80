"""How one call on a worker group becomes one call per rank, and the ranks' results become one result.

``register`` notes on a worker's method how it wants to be called; ``plan_calls`` carries that out. Nothing here knows
how a call reaches a rank.

    group.method(batch) ── plan_calls ──► rank 0: method(rows 0..k)  ──┐
                                          rank 1: method(rows k..2k) ──┴─ collect ──► one DataProto
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from verl.protocol import DataProto
from verl.utils.row_buffer import RowBuffer

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_ATTRIBUTE = "_verl_registration"


class Dispatch(Enum):
    """How the arguments of a call reach the ranks, and what the caller gets back."""

    RANK_ZERO = "rank_zero"
    """Rank 0 alone runs the method; its result comes back."""
    ONE_TO_ALL = "one_to_all"
    """Every rank gets the same arguments; a list of results, by rank, comes back."""
    ALL_TO_ALL = "all_to_all"
    """Where every argument is a list with one entry per rank, each rank gets its entry, else as ``ONE_TO_ALL``."""
    DP_COMPUTE = "dp_compute"
    """Every argument must hold one entry per rank; a list of results comes back."""
    DP_COMPUTE_PROTO = "dp_compute_proto"
    """Each rank gets its run of the rows of every ``DataProto``, and other arguments as they are; the ``DataProto``
    results come back as one."""


class Execute(Enum):
    """Which ranks run a method."""

    ALL = "all"
    RANK_ZERO = "rank_zero"


@dataclass(frozen=True)
class Registration:
    """What ``register`` notes on a method."""

    dispatch_mode: Dispatch
    execute_mode: Execute
    blocking: bool
    padding: bool
    reads: tuple[str, ...] | None = None


class Call(NamedTuple):
    """The arguments of one rank's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Results = Iterable[tuple[int, Any]]
"""Ranks and their results, in the order in which they come."""
Collect = Callable[[Results], Any]


class WorkerFuture(Generic[T]):
    """The result of a call that is still running."""

    def __init__(self, fetch: Callable[[], T]) -> None:
        self._fetch: Callable[[], T] | None = fetch
        self._result: T | None = None

    def get(self) -> T:
        """Wait for the result; raises what the call raised."""
        if self._fetch is not None:
            self._result, self._fetch = self._fetch(), None
        return self._result  # type: ignore[return-value]  # set as soon as _fetch is None


def register(
    dispatch_mode: Dispatch = Dispatch.ALL_TO_ALL,
    execute_mode: Execute = Execute.ALL,
    blocking: bool = True,
    padding: bool = True,
    reads: Sequence[str] | None = None,
) -> Callable[[F], F]:
    """Make a worker's method callable on its group.

    Args:
        dispatch_mode: how arguments are split and results joined.
        execute_mode: ``RANK_ZERO`` runs the method on rank 0 only.
        blocking: wait for the result; False returns a ``WorkerFuture``.
        padding: with ``DP_COMPUTE_PROTO``, repeat rows where they do not divide over the ranks and drop their results.
            False raises ValueError instead: for methods where a repeated row would count twice.
        reads: with ``DP_COMPUTE_PROTO``, the batch keys that the method reads where they are there; no others travel.
            None: all.
    """
    if execute_mode is Execute.RANK_ZERO and dispatch_mode in (Dispatch.DP_COMPUTE, Dispatch.DP_COMPUTE_PROTO):
        raise ValueError(f"{dispatch_mode} splits its arguments over all ranks; it cannot run on rank 0 alone")

    def mark(method: F) -> F:
        read_keys = None if reads is None else tuple(reads)
        setattr(method, _ATTRIBUTE, Registration(dispatch_mode, execute_mode, blocking, padding, read_keys))
        return method

    return mark


def registered_methods(worker_class: type) -> dict[str, Registration]:
    """The registered methods of a class by name; an override keeps the registration of what it overrides."""
    found: dict[str, Registration] = {}
    for parent in worker_class.__mro__:
        for name, member in vars(parent).items():
            if hasattr(member, _ATTRIBUTE):
                found.setdefault(name, getattr(member, _ATTRIBUTE))
    return found


def plan_calls(
    method: str, registration: Registration, world_size: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Call], Collect]:
    """The calls of ranks 0, 1, ..., and what makes one result of theirs.

    Raises:
        ValueError: the arguments do not fit the ranks; the message names the method and the numbers.
    """
    args = tuple(_materialize(value) for value in args)
    kwargs = {name: _materialize(value) for name, value in kwargs.items()}
    mode = registration.dispatch_mode
    if mode is Dispatch.RANK_ZERO or registration.execute_mode is Execute.RANK_ZERO:
        return [Call(args, kwargs)], _first
    if mode is Dispatch.DP_COMPUTE_PROTO:
        return _split_rows(method, registration, world_size, args, kwargs)
    values = [*args, *kwargs.values()]
    listed = [isinstance(value, list | tuple) and len(value) == world_size for value in values]
    if mode is Dispatch.DP_COMPUTE and not all(listed):
        raise ValueError(f"{method} takes lists with one entry for each of its {world_size} ranks")
    if mode is Dispatch.DP_COMPUTE or (mode is Dispatch.ALL_TO_ALL and listed and all(listed)):
        return [_pick(args, kwargs, rank) for rank in range(world_size)], by_rank
    return [Call(args, kwargs)] * world_size, by_rank


def _materialize(value: Any) -> Any:
    return value.get() if isinstance(value, WorkerFuture) else value


def _first(results: Results) -> Any:
    return by_rank(results)[0]


def by_rank(results: Results) -> list[Any]:
    """The results of ranks 0, 1, ..."""
    found = dict(results)
    return [found[rank] for rank in sorted(found)]


def _pick(args: Sequence[Any], kwargs: dict[str, Any], rank: int) -> Call:
    return Call(tuple(value[rank] for value in args), {name: value[rank] for name, value in kwargs.items()})


def _split_rows(
    method: str, registration: Registration, world_size: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Call], Collect]:
    values = [_only(value, registration.reads) for value in (*args, *kwargs.values())]
    sizes = sorted({len(value) for value in values if isinstance(value, DataProto)})
    if len(sizes) > 1:
        raise ValueError(f"{method} got batches of {' and '.join(map(str, sizes))} rows; they must be equally long")
    rows = sizes[0] if sizes else 0
    pad_size = -rows % world_size
    if pad_size and not registration.padding:
        raise ValueError(
            f"{method} got {rows} rows for {world_size} ranks, which do not divide; use a batch size that is a "
            f"multiple of {world_size} (a repeated row would count twice)"
        )
    columns = [
        _row_runs(value, world_size) if isinstance(value, DataProto) else [value] * world_size for value in values
    ]
    count = len(args)
    calls = [
        Call(tuple(row[:count]), dict(zip(kwargs, row[count:], strict=True))) for row in zip(*columns, strict=True)
    ] or [Call((), {})] * world_size
    return calls, lambda results: _join_rows(method, results, rows, -(-rows // world_size))


def _only(value: Any, keys: Sequence[str] | None) -> Any:
    """The columns that a method reads; what it does not stays on the driver."""
    if keys is None or not isinstance(value, DataProto):
        return value
    tensors = None if value.batch is None else [key for key in keys if key in value.batch]
    return value.select(tensors, [key for key in keys if key in value.non_tensor_batch])


def _row_runs(data: DataProto, world_size: int) -> list[DataProto]:
    """The chunks of ``pad_dataproto_to_divisor``'s batch, without making that batch: only the last runs are copies."""
    rows = len(data)
    share = -(-rows // world_size)
    bounds = [(rank * share, (rank + 1) * share) for rank in range(world_size)]
    return [
        data.slice(start, end) if end <= rows else data.select_idxs(np.arange(start, end) % rows)
        for start, end in bounds
    ]


def _join_rows(method: str, results: Results, rows: int, share: int) -> Any:
    """One ``DataProto`` of all ranks' rows without the padding; each rank's is let go as soon as it is in place.

    Results without rows, such as figures alone, are joined as facts; results of other types come back as a list.
    """
    buffer, others = RowBuffer(rows), dict[int, Any]()
    for rank, result in results:
        if isinstance(result, DataProto) and 0 < len(result) == share:
            buffer.put(rank * share, result)
        else:
            others[rank] = result
        del result  # before the next one comes
    if not others:
        return buffer.take()
    values = by_rank(others.items())
    if buffer.is_empty and not all(isinstance(value, DataProto) for value in values):
        return values
    odd = {rank: len(value) for rank, value in sorted(others.items()) if isinstance(value, DataProto) and len(value)}
    if odd or not buffer.is_empty:
        raise ValueError(
            f"{method} must return {share} rows on every rank, or none on any, for padding to be told from rows; it "
            f"did not on ranks {sorted(others)}, with rows by rank {odd}"
        )
    return DataProto.concat(values)
