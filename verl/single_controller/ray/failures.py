"""Waiting for the ranks' results, and one readable error where a rank raises or dies.

Ranks that wait for a dead one in a collective fail after it, or never: the first failure ends the wait, the others
get a moment to show theirs, and the likeliest cause is reported first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from verl.single_controller.base.worker_group import WorkerError

GRACE_S = 5.0
"""Seconds the other ranks have, after the first failure, to report theirs."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank."""

    rank: int
    node_ip: str
    cause: str
    traceback: str
    likelihood: int
    """0 a dead process, 1 an exception, 2 an exception that a peer's death may have caused."""


def gather(refs: Sequence[Any], node_ips: Sequence[str], call_name: str) -> list[Any]:
    """The results of ``refs``, one per rank, as soon as all are there.

    Args:
        refs: object references, by rank.
        node_ips: addresses of the ranks.
        call_name: role and method, for the message.

    Raises:
        WorkerError: at the first rank that fails.
    """
    ranks = {ref: rank for rank, ref in enumerate(refs)}
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=GRACE_S if failures else None)
        if not done:
            break
        rank = ranks[done[0]]
        try:
            results[rank] = ray.get(done[0])
        except RayError as error:
            failures.append(_failure(rank, node_ips[rank], error))
    if failures:
        raise WorkerError(_message(call_name, len(node_ips), failures))
    return [results[rank] for rank in range(len(refs))]


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
