"""What was measured, one line of JSON per finished run; a study that was killed finds here what it has.

In: records of runs. Out: ``results.jsonl``. A line is written whole, in one call, and what a kill left of a line is
taken away before the next is written.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.retention.variants import BEFORE, TEACHER, VARIANTS
from recipe.onpolicy_distill.quickstart import cache as cache_folders

DONE, FAILED = "done", "failed"

Record = dict[str, Any]
"""``run`` (fields of `Run`), ``settings``, ``status``; ``message`` of a failed run; else ``metrics`` (of ``evaluate``),
``curve`` (pairs of step and general accuracy), ``steps`` and ``seconds`` of training."""


@dataclass(frozen=True)
class Run:
    """One run of the study; where it has no settings of a variant, one measurement."""

    world: str
    student_seed: int
    """Of the world and its models."""
    variant: str
    """A key of `VARIANTS`, or TEACHER or BEFORE."""
    seed: int = 0
    """Of the distillation: order of the prompts, and sampling."""
    steps: int | None = None
    """Length of the run."""
    seconds: float | None = None
    """Its length instead, in seconds of training on this machine."""

    @property
    def is_measurement(self) -> bool:
        """Whether nothing is trained."""
        return self.variant in (TEACHER, BEFORE)

    @property
    def settings(self) -> dict[str, Any]:
        """What besides its own fields decides the outcome."""
        own = {} if self.is_measurement else VARIANTS[self.variant].all_settings
        return {**own, "made_by": makers_digest()}

    @property
    def budget(self) -> str:
        """Its length in words."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} s"

    @property
    def name(self) -> str:
        """A name for folders and messages."""
        parts = [self.world, f"student{self.student_seed}", self.variant]
        return "-".join(parts if self.is_measurement else [*parts, f"seed{self.seed}", self.budget.replace(" ", "")])


@dataclass(frozen=True)
class Extras:
    """What is measured of runs besides, without a change to them."""

    ledger_every: int = 0
    """Steps between two lines of ``ledger.jsonl``; 0: none."""
    recall_at: Sequence[int] = ()
    """Lengths of recommendation lists besides those that ``evaluate`` measures."""


@cache
def makers_digest() -> str:
    """A digest of the source text that makes worlds and models: with other models, results are others."""
    quickstart, here = Path(cache_folders.__file__).parent, Path(__file__).parent
    made_by = ("world", "general_tasks", "catalogue", "tokenizers", "models")
    own = (here / f"{name}.py" for name in ("worlds", "online_retail", "synthetic"))
    tiny = (quickstart.parent / f"tiny_{name}" for name in ("tokenizers.py", "chat_template.jinja", "models.py"))
    return cache_folders.file_digest(*tiny, *(quickstart / f"{name}.py" for name in made_by), *own)


def run_of(record: Record) -> Run:
    """The run that a record is of."""
    return Run(**record["run"])


def record_of(run: Run, status: str, **values: Any) -> Record:
    """A record of a run that has ended."""
    return {"run": asdict(run), "settings": run.settings, "status": status, **values}


def read_lines(path: Path) -> list[Record]:
    """All whole lines of a file; none where there is no file."""
    text = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read_results(path: Path) -> list[Record]:
    """All whole lines of a file, the latest of each run alone."""
    records = read_lines(path)
    latest = {json.dumps([record["run"], record["settings"]], sort_keys=True): record for record in records}
    return list(latest.values())


def append_result(path: Path, record: Record) -> None:
    """Write a record after the whole lines of a file."""
    line = (json.dumps(record) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def runs_to_do(wanted: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """The runs that did not succeed yet with the settings that they would have now."""
    have = [(record["run"], record["settings"]) for record in records if record["status"] == DONE]
    return [run for run in wanted if (asdict(run), run.settings) not in have]
