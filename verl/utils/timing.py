"""Wall-clock timing of named stages, as sums and as a timeline."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Timeline:
    """Spans of time on named tracks, appended to a file in Chrome's trace format; https://ui.perfetto.dev shows it.

    The file is a list without its closing bracket, which the format allows: it can be read while the run goes on.

    Args:
        path: the file; None: nothing is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._tracks = path, dict[str, int]()

    def add(self, track: str, name: str, began_s: float, seconds: float) -> None:
        """Append a span; a file that cannot be written is logged once, and the run goes on.

        Args:
            began_s: as ``time.time()`` gives it.
        """
        if self._path is None:
            return
        place = {"pid": os.getpid(), "tid": self._tracks.setdefault(track, len(self._tracks))}
        events: list[dict[str, Any]] = [{"ph": "M", "name": "thread_name", "args": {"name": track}, **place}]
        events += [{"ph": "X", "name": name, "ts": round(began_s * 1e6), "dur": round(seconds * 1e6), **place}]
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write("" if stream.tell() else "[\n")
                stream.writelines(f"{json.dumps(event)},\n" for event in events)
        except OSError as error:
            logger.warning("trainer.timeline: %s cannot be written, and is not from here on: %s", self._path, error)
            self._path = None


@contextmanager
def marked_timer(name: str, timing_raw: dict[str, float], timeline: Timeline | None = None) -> Iterator[None]:
    """Add the seconds spent in the block to ``timing_raw[name]``, and the span to the driver's track of a timeline."""
    began_s, start = time.time(), time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        timing_raw[name] = timing_raw.get(name, 0.0) + seconds
        if timeline is not None:
            timeline.add("driver", name, began_s, seconds)
