"""Calls of Ray actors: waiting for them, and one readable error where one fails, dies or does not answer.

In: actors with names, and references of calls. Out: results in the order in which they finish, or a ``RolloutError``
that names who failed, at what, why, and where its log is.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import OutOfDiskError, RayActorError, RayError

from verl.experimental.agent_loop.base import RolloutError
from verl.utils.process_death import describe_death, disk_full_text, error_output, log_line

POLL_S = 0.5
"""Seconds of waiting after which progress is reported and the rest of the run is looked at."""
_GATHER_S = 0.05


class Remote:
    """A Ray actor, and what errors call it."""

    def __init__(self, name: str, actor: Any, node_ip: str = "") -> None:
        self.name, self.actor, self.node_ip = name, actor, node_ip
        self._log: Any = None
        self._sign: Any = None

    def ask_for_log(self) -> None:
        """Have it say where its errors go, before it does anything else."""
        self._log = self._sign = self.actor.__ray_call__.remote(lambda _: error_output())

    def check_alive(self) -> None:
        """Look whether the process lives; returns at once.

        Raises:
            RolloutError: it has died.
        """
        if not ray.wait([self._sign], timeout=0)[0]:
            return
        try:
            ray.get(self._sign)
        except RayError as error:
            raise RolloutError(f"{self.name} failed: {self.account_of(error, self.log())}") from error
        self._sign = self._ask_for_sign()

    def _ask_for_sign(self) -> Any:
        """A call that comes back as soon as the process can answer."""
        return self.actor.__ray_call__.remote(_ping)

    def account_of(self, error: RayError, log: str | None) -> str:
        """What went wrong in it, without the trace through Ray, and the line that says where its log is."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, RolloutError):
            return str(cause)  # of another process, which is named there
        if isinstance(cause, ValueError):
            return str(cause)  # for the user to mend; says all there is to know
        return f"{_cause_of(error)}\n{log_line(log, self.node_ip)}"

    def log(self) -> str | None:
        """The file with its errors, if it lived long enough to say."""
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


def _ping(_: Any) -> None:
    """Reaching this is the answer."""


def collect(calls: Mapping[Any, Remote], doing: str, **options: Any) -> list[Any]:
    """Results of remote calls, in order; see ``as_they_come``."""
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
    pending, started = list(calls), time.monotonic()
    while pending:
        done, _ = ray.wait(pending, num_returns=1, timeout=POLL_S)
        # Those that finish together are taken together: one look at all per call would be quadratic in their number.
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=_GATHER_S) if done else (done, pending)
        for call in done:
            try:
                result = ray.get(call)
            except RayError as error:
                kind = ValueError if isinstance(error, ValueError) else RolloutError
                raise kind(
                    f"{calls[call].name} failed to {doing}: {calls[call].account_of(error, calls[call].log())}"
                ) from error
            yield numbers[call], result
            del result  # before the next one comes
        if report:
            report()
        if watch and not done:
            watch()
        if timeout_s is not None and pending and time.monotonic() - started > timeout_s:
            late = ", ".join(calls[call].name for call in pending)
            raise RolloutError(
                f"{late} did not {doing} within actor_rollout_ref.rollout.timeout_s={timeout_s:g} s; it hangs"
            )


def _cause_of(error: RayError) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, OutOfDiskError):
        return disk_full_text()
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    return describe_death(str(error)) if isinstance(error, RayActorError) else str(error)
