"""What all parts share: where they compute, a clock, and the report, which has a line for each check."""

import json
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

OK, FAILED, OFF, FIGURE = "ok", "FAILED", "off", "-"
"""Results of a check: inside its bound, outside, outside of an estimate, which fails nothing, and without a bound."""


class Skipped(Exception):
    """A part cannot run here; the text is the reason."""


def judge(seen: Any, bound: str, source: str) -> str:
    """The result of a check. ``bound`` is a relation and a JSON value, such as ``<= 0.02``; a ``source`` that begins
    with "estimate" means that nobody has measured it yet."""
    if not bound:
        return FIGURE
    relation, _, wanted = bound.partition(" ")
    holds = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}[relation](seen, json.loads(wanted))
    return OK if holds else OFF if source.startswith("estimate") else FAILED


class Bench(NamedTuple):
    """What a part is given. Its checks go to a file at once, so that a crash loses none of them."""

    smoke: bool
    """Tiny shapes on the CPU."""
    work: Path
    """Folder for models and runs, shared by all parts."""
    results: Path
    """The report, a JSON document a line."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cpu" if self.smoke else "cuda"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """First extended id, ids and rows of the student, rows of the teacher: OneRec's over Qwen3's."""
        return (500, 612, 640, 576) if self.smoke else (151669, 176247, 176384, 151936)

    def check(self, name: str, seen: Any, bound: str = "", source: str = "") -> None:
        """Report what was seen, with its bound and where that comes from."""
        line = {"check": name, "seen": seen, "expected": bound, "result": judge(seen, bound, source), "source": source}
        with self.results.open("a") as report:
            print(json.dumps(line), file=report)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What the block raises is a failed check, and the part goes on after it."""
        try:
            yield
        except Exception as error:
            self.check(name, f"{type(error).__name__}: {error}".splitlines()[0][:160], '== "runs"', "raises nothing")

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, with all that the call queued on the GPU, and its result."""
        from verl.utils.device import synchronize

        synchronize(self.device)
        began, result = time.perf_counter(), call()
        synchronize(self.device)
        return time.perf_counter() - began, result

    def gib(self, kind: str) -> float:
        """GiB of this process on the GPU, ``memory_reserved`` and the like; 0 on the CPU."""
        import torch

        return 0.0 if self.smoke else getattr(torch.cuda, kind)() / 2**30


def apart(found: Any, right: Any) -> float:
    """Norm of the difference of two tensors, relative to that of the second."""
    return float((found.float() - right.float()).norm() / right.float().norm())
