"""Waiting for the ranks' results, and one readable error where a rank raises or dies.

Ranks that wait for a dead one in a collective fail after it, or never: the first failure ends the wait, the others
get a moment to show theirs, and the likeliest cause is reported first. What dies elsewhere meanwhile is asked for now
and then (``watch``): a call would not hear of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfDiskError, RayActorError, RayError, RayTaskError

from verl.single_controller.base.worker_group import WorkerError
from verl.utils.process_death import describe_death, disk_full_text, error_output, log_line

GRACE_S = 5.0
"""Seconds the other ranks have, after the first failure, to report theirs."""
PEER_GRACE_S = 40.0
"""The same where all failures so far may come from a peer's death: a machine that is cut off is missed only after some
failed health checks, and it is the one to name."""
GATHER_S = 0.05
"""Seconds in which results that arrive after the first are taken with it."""
WATCH_S = 2.0
"""Seconds of waiting after which the rest of the run is looked at."""


class Processes:
    """The processes of a group: where they run, where their errors go, whether they live.

    Each is asked as it starts for its log, and by ``check_alive`` for a sign of life; one question at a time, which a
    busy rank answers when it is done.
    """

    def __init__(self, name: str, hosts: Sequence[Any], node_ips: Sequence[str]) -> None:
        """``name``: what the group is called in messages."""
        self.name, self.node_ips = name, list(node_ips)
        self._hosts = list(hosts)
        self._logs = [host.__ray_call__.remote(lambda _: error_output()) for host in hosts]
        self._signs = {log: rank for rank, log in enumerate(self._logs)}

    def log_of(self, rank: int) -> str | None:
        """The file with a rank's errors, if it lived long enough to say."""
        told, _ = ray.wait([self._logs[rank]], timeout=0)
        try:
            return ray.get(told[0]) if told else None
        except RayError:
            return None

    def check_alive(self) -> None:
        """Look whether every process lives; returns at once.

        Raises:
            WorkerError: one has died.
        """
        told, _ = ray.wait(list(self._signs), num_returns=len(self._signs), timeout=0)
        for sign in told:
            rank = self._signs.pop(sign)
            try:
                ray.get(sign)
            except RayError as error:
                raise WorkerError(_message(self.name, self, [_failure(rank, self.node_ips[rank], error)])) from error
            self._signs[self._hosts[rank].__ray_call__.remote(_ping)] = rank


def _ping(_: Any) -> None:
    """Reaching this is the answer."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank."""

    rank: int
    node_ip: str
    cause: str
    traceback: str
    likelihood: int
    """0 a dead process, 1 an exception, 2 an exception that a peer's death may have caused."""
    by_user: bool = False
    """A ValueError: the same again would end the same."""


def gather(
    refs: Sequence[Any], processes: Processes, call_name: str, watch: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """Ranks and results of ``refs`` as they come; nothing more once a rank has failed.

    Args:
        refs: object references, by rank.
        call_name: role and method, for the message.
        watch: called now and then; what it raises ends the wait.

    Raises:
        WorkerError: at the first rank that fails, once the others have had their moment.
    """
    ranks = {ref: rank for rank, ref in enumerate(refs)}
    failures: list[Failure] = []
    pending = list(refs)
    while pending:
        done, _ = ray.wait(pending, num_returns=1, timeout=_patience(failures))
        if not done and failures:
            break
        if not done:
            watch()
            continue
        # Those that finish together are taken together: one look at all per rank would be quadratic in their number.
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=GATHER_S)
        for ref in done:
            rank = ranks[ref]
            try:
                result = ray.get(ref)
            except RayError as error:
                failures.append(_failure(rank, processes.node_ips[rank], error))
                continue
            yield rank, result
            del result  # before the next one comes
    if failures:
        first = min(failures, key=lambda failure: failure.likelihood)
        raise WorkerError(_message(call_name, processes, failures), by_user=first.by_user)


def _patience(failures: Sequence[Failure]) -> float:
    if not failures:
        return WATCH_S
    return GRACE_S if any(failure.likelihood < 2 for failure in failures) else PEER_GRACE_S


def _failure(rank: int, node_ip: str, error: RayError) -> Failure:
    if isinstance(error, OutOfDiskError):  # also one that comes as a RayTaskError
        return Failure(rank, node_ip, disk_full_text(), "", 1)
    if isinstance(error, RayTaskError):
        lines = str(error.cause).strip().splitlines() or [""]
        cause = f"{type(error.cause).__name__}: {lines[0]}"
        from_peer = any(name in cause.lower() for name in ("gloo", "nccl", "distbackenderror"))
        by_user = isinstance(error.cause, ValueError)
        return Failure(rank, node_ip, cause, str(error).strip(), 2 if from_peer else 1, by_user)
    if isinstance(error, RayActorError):
        return Failure(rank, node_ip, describe_death(str(error)), "", 0)
    return Failure(rank, node_ip, f"{type(error).__name__}: {' '.join(str(error).split())}", "", 1)


def _message(call_name: str, processes: Processes, failures: list[Failure]) -> str:
    first, *others = sorted(failures, key=lambda failure: failure.likelihood)
    ranks = len(processes.node_ips)
    lines = [f"{call_name} failed on rank {first.rank} of {ranks}, node {first.node_ip}: {first.cause}"]
    lines.append(log_line(processes.log_of(first.rank), first.node_ip))
    lines += [f"rank {other.rank}, node {other.node_ip}, failed too: {other.cause}" for other in others]
    if first.traceback:
        lines += [f"Traceback of rank {first.rank}:", first.traceback]
    return "\n".join(lines)
