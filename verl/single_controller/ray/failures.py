"""Waiting for the ranks' results, and one readable error where a rank raises or dies.

Ranks that wait for a dead one in a collective fail after it, or never: the first failure ends the wait, the others
get a moment to show theirs, and the likeliest cause is reported first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from verl.single_controller.base.worker_group import WorkerError

GRACE_S = 5.0
"""Seconds the other ranks have, after the first failure, to report theirs."""
PEER_GRACE_S = 40.0
"""The same where all failures so far may come from a peer's death: a machine that is cut off is missed only after some
failed health checks, and it is the one to name."""
GATHER_S = 0.05
"""Seconds in which results that arrive after the first are taken with it."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank."""

    rank: int
    node_ip: str
    cause: str
    traceback: str
    likelihood: int
    """0 a dead process, 1 an exception, 2 an exception that a peer's death may have caused."""


def gather(refs: Sequence[Any], node_ips: Sequence[str], call_name: str) -> Iterator[tuple[int, Any]]:
    """Ranks and results of ``refs`` as they come; nothing more once a rank has failed.

    Args:
        refs: object references, by rank.
        node_ips: addresses of the ranks.
        call_name: role and method, for the message.

    Raises:
        WorkerError: at the first rank that fails, once the others have had their moment.
    """
    ranks = {ref: rank for rank, ref in enumerate(refs)}
    failures: list[Failure] = []
    pending = list(refs)
    while pending:
        done, _ = ray.wait(pending, num_returns=1, timeout=_patience(failures))
        if not done:
            break
        # Those that finish together are taken together: one look at all per rank would be quadratic in their number.
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=GATHER_S)
        for ref in done:
            rank = ranks[ref]
            try:
                result = ray.get(ref)
            except RayError as error:
                failures.append(_failure(rank, node_ips[rank], error))
                continue
            yield rank, result
            del result  # before the next one comes
    if failures:
        raise WorkerError(_message(call_name, len(node_ips), failures))


def _patience(failures: Sequence[Failure]) -> float | None:
    if not failures:
        return None
    return GRACE_S if any(failure.likelihood < 2 for failure in failures) else PEER_GRACE_S


def _failure(rank: int, node_ip: str, error: RayError) -> Failure:
    if isinstance(error, RayTaskError):
        lines = str(error.cause).strip().splitlines() or [""]
        cause = f"{type(error.cause).__name__}: {lines[0]}"
        from_peer = any(name in cause.lower() for name in ("gloo", "nccl", "distbackenderror"))
        return Failure(rank, node_ip, cause, str(error).strip(), 2 if from_peer else 1)
    text = " ".join(str(error).split())
    if isinstance(error, RayActorError):
        # Ray's text starts with ids; what it knows of the reason comes last.
        return Failure(rank, node_ip, f"the process died: {text.rpartition('Worker exit detail: ')[2]}", "", 0)
    return Failure(rank, node_ip, f"{type(error).__name__}: {text}", "", 1)


def _message(call_name: str, world_size: int, failures: list[Failure]) -> str:
    first, *others = sorted(failures, key=lambda failure: failure.likelihood)
    lines = [f"{call_name} failed on rank {first.rank} of {world_size}, node {first.node_ip}: {first.cause}"]
    lines += [f"rank {other.rank}, node {other.node_ip}, failed too: {other.cause}" for other in others]
    if first.traceback:
        lines += [f"Traceback of rank {first.rank}:", first.traceback]
    return "\n".join(lines)
