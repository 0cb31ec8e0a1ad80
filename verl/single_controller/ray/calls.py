"""Calls of Ray actors: waiting for them, their logs, and one readable error where one raises, dies or does not answer.

In: actors with names, and references of their calls. Out: results in the order in which they finish, or an error that
names who failed, at what, why, and where its log is.

=====================  ==============================================================================================
``as_they_come``       engines and agent-loop workers: the first failure ends the wait (``RolloutError``)
``Ranks.results``      ranks of a group, which wait for each other in collectives: after the first failure the others
                       get a moment to show theirs, and the likeliest cause is named first (``WorkerError``)
=====================  ==============================================================================================

A call learns nothing of a process that dies elsewhere, so both call ``watch`` now and then.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import OutOfDiskError, RayActorError, RayError, RayTaskError

from verl.single_controller.base.worker_group import RolloutError, WorkerError

POLL_S = 0.5
"""Seconds without a result after which progress is reported and ``watch`` is called."""
GATHER_S = 0.05
"""Seconds in which results that arrive after the first are taken with it."""
GRACE_S = 5.0
"""Seconds that the other ranks have, after the first failure, to report theirs."""
PEER_GRACE_S = 40.0
"""The same where all failures so far may come from another rank's death: Ray notices a machine that is cut off only
after some failed health checks, and that machine is the one to name."""


class Remote:
    """A Ray actor, and its name in errors."""

    def __init__(self, name: str, actor: Any, node_ip: str = "") -> None:
        self.name, self.actor, self.node_ip = name, actor, node_ip
        self._log: Any = None
        self._sign: Any = None

    def ask_for_log(self) -> None:
        """Ask where its errors go, before it does anything else."""
        # A lambda travels by value: this package need not be imported there yet, which may be what fails.
        self._log = self._sign = self.actor.__ray_call__.remote(lambda _: os.readlink("/proc/self/fd/2"))

    def find_death(self) -> RayError | None:
        """What Ray knows of its death; None while it lives. Returns at once.

        One question at a time is under way, which a busy process answers when it is done.
        """
        if not ray.wait([self._sign], timeout=0)[0]:
            return None
        try:
            ray.get(self._sign)
        except RayError as error:
            return error
        self._sign = self._ask_for_sign()
        return None

    def check_alive(self) -> None:
        """Raise ``RolloutError`` where the process has died; returns at once."""
        if (error := self.find_death()) is not None:
            raise RolloutError(f"{self.name} failed: {self.account_of(error, self.log())}") from error

    def _ask_for_sign(self) -> Any:
        """A call that comes back as soon as the process can answer."""
        return self.actor.__ray_call__.remote(lambda _: None)

    def account_of(self, error: RayError, log: str | None) -> str:
        """What went wrong in it, without the trace through Ray, and the line that says where its log is."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, RolloutError | ValueError):
            return str(cause)  # names another process and its log, or what the user has to change
        return f"{_cause_of(error)}\n{self.log_line(log)}"

    def log_line(self, log: str | None) -> str:
        """The line that says where its log is; unknown where it died before it could answer."""
        return f"log: {log or 'not known'} on node {self.node_ip}"

    def log(self) -> str | None:
        """The file with its errors; None where it died before it could answer."""
        if self._log is None or not ray.wait([self._log], timeout=0)[0]:
            return None
        try:
            return ray.get(self._log)
        except RayError:
            return None

    async def log_async(self) -> str | None:
        """The same, for actors with an event loop, which must not block it."""
        try:
            return None if self._log is None else await self._log
        except RayError:
            return None


def _in_batches(refs: Iterable[Any], wait_s: Callable[[], float]) -> Iterator[list[Any]]:
    """References that have finished, as they do; an empty list after every ``wait_s()`` seconds without one.

    Those that finish together are taken together: one ``ray.wait`` per reference would be quadratic in their number.
    """
    pending = list(refs)
    while pending:
        done, _ = ray.wait(pending, num_returns=1, timeout=wait_s())
        if done:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=GATHER_S)
        yield done


def collect(calls: Mapping[Any, Remote], doing: str, **options: Any) -> list[Any]:
    """Results of remote calls, in the order of the calls; see ``as_they_come``."""
    results = dict(as_they_come(calls, doing, **options))
    return [results[index] for index in range(len(calls))]


def as_they_come(
    calls: Mapping[Any, Remote],
    doing: str,
    *,
    watch: Callable[[], None] | None = None,
    report: Callable[[], None] | None = None,
    timeout_s: float | None = None,
) -> Iterator[tuple[int, Any]]:
    """Numbers and results of remote calls in the order in which they finish; the first to fail ends the wait.

    Args:
        calls: who makes each call.
        doing: what they do, for the message: "... failed to {doing}".
        watch: called now and then while nothing comes; what it raises ends the wait.
        report: called every half second while they do it.
        timeout_s: seconds that all of them have together; None: as long as they take.

    Raises:
        RolloutError: one failed, or had no time left.
        ValueError: one raised it.
    """
    numbers = {call: number for number, call in enumerate(calls)}
    started = time.monotonic()
    for done in _in_batches(calls, lambda: POLL_S):
        for call in done:
            try:
                result = ray.get(call)
            except RayError as error:
                kind = ValueError if isinstance(error, ValueError) else RolloutError
                account = calls[call].account_of(error, calls[call].log())
                raise kind(f"{calls[call].name} failed to {doing}: {account}") from error
            yield numbers.pop(call), result
            del result  # before the next one comes
        if report:
            report()
        if watch and not done:
            watch()
        if timeout_s is not None and numbers and time.monotonic() - started > timeout_s:
            late = ", ".join(calls[call].name for call in numbers)
            raise RolloutError(
                f"{late} did not {doing} within actor_rollout_ref.rollout.timeout_s={timeout_s:g} s; it hangs"
            )


class Failure(NamedTuple):
    """What went wrong on one rank."""

    likelihood: int
    """0 a dead process, 1 an exception, 2 an exception that another rank's death may have caused."""
    rank: int
    cause: str
    traceback: str
    by_user: bool
    """A ValueError: the same again would end the same."""


class Ranks:
    """The processes of a worker group, by rank."""

    def __init__(self, name: str, actors: Sequence[Any], node_ips: Sequence[str]) -> None:
        """``name``: what the group is called in messages."""
        self.name = name
        self._ranks = [Remote(f"rank {rank}", actor, node_ips[rank]) for rank, actor in enumerate(actors)]
        for remote in self._ranks:
            remote.ask_for_log()

    def check_alive(self) -> None:
        """Raise ``WorkerError`` where a process has died; returns at once."""
        for rank, remote in enumerate(self._ranks):
            if (error := remote.find_death()) is not None:
                raise WorkerError(self._message(self.name, [_failure(rank, error)])) from error

    def results(self, refs: Sequence[Any], call_name: str, watch: Callable[[], None]) -> Iterator[tuple[int, Any]]:
        """Ranks and results of ``refs`` as they come; nothing more once a rank has failed.

        Args:
            refs: references of one call on every rank, in rank order.
            call_name: role and method, for the message.
            watch: called now and then; what it raises ends the wait.

        Raises:
            WorkerError: a rank failed; the others had a moment to report their failures.
        """
        ranks = {ref: rank for rank, ref in enumerate(refs)}
        failures: list[Failure] = []

        def wait_s() -> float:
            if not failures:
                return POLL_S
            return GRACE_S if failures[0].likelihood < 2 else PEER_GRACE_S

        for done in _in_batches(refs, wait_s):
            if not done and failures:
                break
            if not done:
                watch()
            for ref in done:
                try:
                    result = ray.get(ref)
                except RayError as error:
                    failures.append(_failure(ranks[ref], error))
                    failures.sort(key=lambda failure: failure.likelihood)  # stable: the first to fail stays first
                    continue
                yield ranks[ref], result
                del result  # before the next one comes
        if failures:
            raise WorkerError(self._message(call_name, failures), by_user=failures[0].by_user)

    def _message(self, call_name: str, failures: list[Failure]) -> str:
        """``failures``: the likeliest cause first."""
        first, *others = failures
        remote = self._ranks[first.rank]
        lines = [
            f"{call_name} failed on rank {first.rank} of {len(self._ranks)}, node {remote.node_ip}: {first.cause}",
            remote.log_line(remote.log()),
        ]
        for other in others:
            lines.append(f"rank {other.rank}, node {self._ranks[other.rank].node_ip}, failed too: {other.cause}")
        if first.traceback:
            lines += [f"Traceback of rank {first.rank}:", first.traceback]
        return "\n".join(lines)


def _failure(rank: int, error: RayError) -> Failure:
    cause = _cause_of(error).splitlines()[0]
    if isinstance(error, RayActorError):
        return Failure(0, rank, cause, "", False)
    if not isinstance(error, RayTaskError) or isinstance(error, OutOfDiskError):
        return Failure(1, rank, cause, "", False)
    from_other = any(name in cause.lower() for name in ("gloo", "nccl", "distbackenderror"))
    return Failure(2 if from_other else 1, rank, cause, str(error).strip(), isinstance(error.cause, ValueError))


def _cause_of(error: RayError) -> str:
    """What went wrong, without the trace through Ray."""
    cause = getattr(error, "cause", None)
    if isinstance(error, OutOfDiskError) or isinstance(cause, OutOfDiskError):
        return disk_full_text()
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {str(cause).strip()}"
    one_line = " ".join(str(error).split())
    if isinstance(error, RayActorError):
        # Ray's text begins with ids, and what it knows of the reason comes last.
        reason, guesses, _ = one_line.rpartition("Worker exit detail: ")[2].partition(" Some common causes include:")
        return f"the process died: {reason}{' (killed, out of memory, or crashed)' if guesses else ''}"
    return f"{type(error).__name__}: {one_line}"


def disk_full_text() -> str:
    """Ray's object store and the disk that it spills to are full, on this node."""
    return (
        "no space: Ray's object store is full, and so is the disk under /tmp/ray that it spills to; "
        "free some there, name another with ray_kwargs.ray_init._temp_dir, or raise "
        "ray_kwargs.ray_init.object_store_memory"
    )
