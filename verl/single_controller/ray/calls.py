"""Calls of Ray actors: waiting for them, their logs, and one readable error where one raises, dies or does not answer.

In: actors with names, and references of their calls. Out: results in the order in which they finish, or an error that
names who failed, at what, why, and where its log is.

=====================  ==============================================================================================
``as_they_come``       engines and agent-loop workers: the first failure ends the wait (``RolloutError``)
``RankResults``        ranks of a group, which wait for each other in collectives: after the first failure the others
                       get a moment to show theirs, and the likeliest cause is named first (``WorkerError``)
=====================  ==============================================================================================

A call learns nothing of a process that dies elsewhere, so both call ``watch`` now and then.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayActorError, RayError, RayTaskError

from verl.single_controller.base.decorator import RolloutError, WorkerError

POLL_S = 0.5
"""Seconds without a result after which progress is reported and ``watch`` is called."""
GATHER_S = 0.05
"""Seconds in which results that arrive after the first are taken with it."""
GRACE_S = 5.0
"""Seconds that the other ranks have, after the first failure, to report theirs."""
PEER_GRACE_S = 40.0
"""The same where all failures so far may come from another rank's death: Ray notices a machine that is cut off only
after some failed health checks, and that machine is the one to name."""

DISK_FULL = (
    "no space: Ray's object store is full, and so is the disk under /tmp/ray that it spills to; free some there, "
    "name another with ray_kwargs.ray_init._temp_dir, or raise ray_kwargs.ray_init.object_store_memory"
)


class Remote:
    """An actor, and its name in errors. It has a method ``check_alive``, which answers as soon as it can."""

    def __init__(self, name: str, actor: Any, node_ip: str = "") -> None:
        self.name, self.actor, self.node_ip = name, actor, node_ip
        self._log: Any = None
        self._sign: Any = None

    def ask_for_log(self) -> None:
        """Ask where its errors go, before it does anything else."""
        # A lambda travels by value: this package need not be imported there yet, which may be what fails.
        self._log = self._sign = self.actor.__ray_call__.remote(lambda _: os.readlink("/proc/self/fd/2"))

    def find_death(self) -> RayError | None:
        """The error that its death raises; None while it lives. Returns at once.

        One call of ``check_alive`` is always pending, which a busy process answers when it is free.
        """
        if self._sign is None:  # an object of this process, which lives as long as its caller
            return None
        try:
            ray.get(self._sign, timeout=0)
        # First, for it is a RayError too.
        except GetTimeoutError:
            return None
        except RayError as error:
            return error
        self._sign = self.actor.check_alive.remote()
        return None

    def check_alive(self) -> None:
        """Raise ``RolloutError`` where the process has died; returns at once."""
        if (error := self.find_death()) is not None:
            raise RolloutError(f"{self.name} failed: {self.account_of(error, self.log())}") from error

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
        try:
            return ray.get(self._log, timeout=0)
        # GetTimeoutError among them: a process that is still busy has not answered yet.
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


def finished(calls: Collection[Any]) -> list[Any]:
    """Those of some calls that have finished; returns at once."""
    return ray.wait(list(calls), num_returns=len(calls), timeout=0)[0] if calls else []


def as_they_come(
    calls: Mapping[Any, Remote], doing: str, *, watch: Callable[[], None] = lambda: None, timeout_s: float | None = None
) -> Iterator[tuple[int, Any]]:
    """Numbers and results of remote calls in the order in which they finish; the first to fail ends the wait.

    Args:
        calls: who makes each call.
        doing: what they do, for the message: "... failed to {doing}".
        watch: called now and then while nothing comes; what it raises ends the wait.
        timeout_s: seconds that all of them have together; None: as long as they take.

    Raises:
        RolloutError: one failed, or had no time left.
    """
    numbers = {call: number for number, call in enumerate(calls)}
    started = time.monotonic()
    for done in _in_batches(calls, lambda: POLL_S):
        for call in done:
            try:
                result = ray.get(call)
            except RayError as error:
                account = calls[call].account_of(error, calls[call].log())
                message = f"{calls[call].name} failed to {doing}: {account}"
                raise RolloutError(message, by_user=is_by_user(error)) from error
            yield numbers.pop(call), result
            del result  # before the next one comes
        if not done:
            watch()
        if timeout_s is not None and numbers and time.monotonic() - started > timeout_s:
            late = ", ".join(calls[call].name for call in numbers)
            raise RolloutError(f"{late} did not {doing} within actor_rollout_ref.rollout.timeout_s={timeout_s:g} s")


class RankResults:
    """Ranks and results of one call as they come, and nothing more once a rank has failed; nothing is waited for, and
    nothing raised, before they are read.

    Args:
        refs: references of the call, in rank order.
        call_name: role and method, for the message.
        watch: called now and then; what it raises ends the wait.
    """

    def __init__(self, ranks: Sequence[Remote], refs: Sequence[Any], call_name: str, watch: Callable[[], None]) -> None:
        self._ranks, self._refs, self._call_name, self._watch = ranks, refs, call_name, watch

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Raises ``WorkerError`` where a rank failed; the others had a moment to report their failures."""
        numbers = {ref: rank for rank, ref in enumerate(self._refs)}
        failures: list[tuple[int, RayError]] = []

        def wait_s() -> float:
            if not failures:
                return POLL_S
            return PEER_GRACE_S if _may_be_a_consequence(failures[0][1]) else GRACE_S

        for done in _in_batches(self._refs, wait_s):
            # The others had their time; one that waits in a collective for a dead rank may never answer.
            if not done and failures:
                break
            if not done:
                self._watch()
            for ref in done:
                try:
                    result = ray.get(ref)
                except RayError as error:
                    failures.append((numbers[ref], error))
                    # The likeliest cause first: a dead process, then an exception; the first to fail stays first.
                    failures.sort(
                        key=lambda each: (not isinstance(each[1], RayActorError), _may_be_a_consequence(each[1]))
                    )
                    continue
                yield numbers[ref], result
                del result  # before the next one comes
        if failures:
            raise failure_of_ranks(self._ranks, failures, self._call_name)

    def check(self) -> None:
        """Raise ``WorkerError`` where a rank has failed; fetches what has come."""
        try:
            ray.get(finished(self._refs))
        except RayError:
            list(self)


def failure_of_ranks(ranks: Sequence[Remote], failures: Sequence[tuple[int, RayError]], call_name: str) -> WorkerError:
    """The error that names the first of ``failures`` in its first line, and where its log is in the second."""
    (rank, error), *others = failures
    lines = [
        f"{call_name} failed on rank {rank} of {len(ranks)}, node {ranks[rank].node_ip}: {_first_line(error)}",
        ranks[rank].log_line(ranks[rank].log()),
        *(f"rank {other}, node {ranks[other].node_ip}, failed too: {_first_line(theirs)}" for other, theirs in others),
    ]
    if isinstance(error, RayTaskError):
        lines += [f"Traceback of rank {rank}:", str(error).strip()]
    return WorkerError("\n".join(lines), by_user=is_by_user(error))


def _may_be_a_consequence(error: RayError) -> bool:
    """Whether another rank's death may have caused an exception: it comes from a collective."""
    cause = _first_line(error).lower()
    return isinstance(error, RayTaskError) and any(name in cause for name in ("gloo", "nccl", "distbackenderror"))


def _first_line(error: RayError) -> str:
    return _cause_of(error).splitlines()[0]


def _cause_of(error: RayError) -> str:
    """What went wrong, without the trace through Ray."""
    cause = getattr(error, "cause", None)
    if isinstance(error, OutOfDiskError) or isinstance(cause, OutOfDiskError):
        return DISK_FULL
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {str(cause).strip()}"
    one_line = " ".join(str(error).split())
    if isinstance(error, RayActorError):
        # Ray's text begins with ids, and what it knows of the reason comes last.
        reason, guesses, _ = one_line.rpartition("Worker exit detail: ")[2].partition(" Some common causes include:")
        return f"the process died: {reason}{' (killed, out of memory, or crashed)' if guesses else ''}"
    return f"{type(error).__name__}: {one_line}"


def is_by_user(error: BaseException) -> bool:
    """Whether what a process raised is a ValueError, there or in a process that it called in turn."""
    cause = getattr(error, "cause", None)
    return isinstance(cause, ValueError) or getattr(cause, "by_user", False)


@contextmanager
def sending(call_name: str) -> Iterator[None]:
    """Raise ``WorkerError`` where neither memory nor disk has space for the arguments of a call."""
    try:
        yield
    except (OutOfDiskError, ObjectStoreFullError) as error:
        raise WorkerError(f"{call_name} could not be given its data: {DISK_FULL}") from error
