"""Wall-clock timing of named stages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from verl.protocol import DataProto


@contextmanager
def marked_timer(name: str, timing_raw: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent in the block to ``timing_raw[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timing_raw[name] = timing_raw.get(name, 0.0) + time.perf_counter() - start


def run_stage(
    timing: dict[str, float], name: str, stage: Callable[[DataProto], DataProto], batch: DataProto
) -> DataProto:
    """Run a stage, time it under ``name``, and return the batch with the stage's new keys."""
    with marked_timer(name, timing):
        return batch.union(stage(batch))
