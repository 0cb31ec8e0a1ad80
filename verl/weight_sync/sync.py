"""The driver: the order of calls of a weight sync.

In:  the training ranks, the engines and which ranks are beside each of them. Out: every engine has the new weights.

    all engines: start_weight_update
    per bucket:  all ranks export ─► all engines load what the ranks beside them exported ─► all ranks release
    all engines: finish_weight_update(version); each checks that the whole model came, and stamps its answers

Not here: how calls reach ranks and engines, and how long they are waited for; that is the caller's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Bucket = dict[str, Any]
"""Where to read one bucket; see `send.WeightExporter.export`."""

Wait = Callable[[str, list[Any]], Any]
"""``wait(task, calls)`` waits for calls that were started, one per engine; ``task`` is for its error message."""


class WeightSource(Protocol):
    """The student's worker group, as far as a weight sync needs it; lists have one entry per rank."""

    def num_weight_buckets(self) -> int: ...

    def export_weight_bucket(self, index: int) -> list[Bucket | None]: ...

    def release_weight_bucket(self, index: int) -> Any: ...


def send_weights(
    student: WeightSource, engines: Sequence[Any], ranks_beside: Sequence[Sequence[int]], wait: Wait, version: int
) -> None:
    """Send the student's weights to every engine.

    Args:
        engines: handles of rollout replicas; as with a Ray actor, ``engine.method.remote(...)`` starts a call.
        ranks_beside: per engine the ranks whose export it reads: on CUDA those on its GPUs, on CPU all of its node.
        version: number of these weights; engines stamp their answers with it.
    """
    wait("begin a weight sync", [engine.start_weight_update.remote() for engine in engines])
    for index in range(student.num_weight_buckets()):
        exports = student.export_weight_bucket(index)
        try:
            buckets = [bucket_for(ranks, exports) for ranks in ranks_beside]
            wait(
                f"load weight bucket {index} of version {version}",
                [engine.update_weights.remote(bucket) for engine, bucket in zip(engines, buckets, strict=True)],
            )
        finally:
            student.release_weight_bucket(index)
    calls = [engine.finish_weight_update.remote(version) for engine in engines]
    wait(f"finish the weight sync of version {version}", calls)


def bucket_for(ranks: Sequence[int], exports: Sequence[Bucket | None]) -> Bucket:
    """What the engine beside ``ranks`` reads one bucket from.

    A file in a node's shared memory serves as it is. Handles of GPU memory are joined, so that the engine gets those
    of its own GPUs: all ranks' handles for all engines would grow with the square of the cluster.

    Raises:
        ValueError: none of the ranks exported the bucket.
    """
    found = [export for export in (exports[rank] for rank in ranks) if export is not None]
    if not found:
        raise ValueError(f"none of the training ranks {', '.join(map(str, ranks))} exported the weights for its node")
    if "ipc_handles" not in found[0]:
        return found[0]
    by_tensor = zip(*(export["ipc_handles"] for export in found), strict=True)
    return {**found[0], "ipc_handles": [{gpu: of for own in tensor for gpu, of in own.items()} for tensor in by_tensor]}
