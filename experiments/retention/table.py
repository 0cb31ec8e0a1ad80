"""From results to a table: what came back, what was kept, mean and spread over runs.

In: records of `results`. Out: summaries per world, budget and variant, and their text in Markdown. ``kept`` is after
over before, each run beside its own student; the spread is the sample standard deviation over runs.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.retention.results import DONE, FAILED, Record, Run, run_of
from experiments.retention.variants import BEFORE, TEACHER, VARIANTS

RECOVERED = 0.95
"""Share of the teacher's general accuracy that counts as recovered."""

LONG_LISTS = (20, 64)
"""Recall@K that is shown where it was measured (``--ks``)."""
KEPT = {
    "recall_1_kept": "rec_recall_at_1",
    "recall_5_kept": "rec_recall",
    **{f"recall_{k}_kept": f"rec_recall_at_{k}" for k in LONG_LISTS},
    "free_kept": "free_rate",
    "text_kept": "rec_text_accuracy",
}
"""Metrics shown as a share of what they were, and what ``evaluate`` calls them."""
AS_THEY_ARE = {"general": "general_accuracy", "item_mass": "extend_mass", "leak": "leak_rate"}
COLUMNS = {
    "general": "general accuracy",
    "recall_1_kept": "R@1 kept",
    "recall_5_kept": "R@5 kept",
    **{f"recall_{k}_kept": f"R@{k} kept" for k in LONG_LISTS},
    "free_kept": "free kept",
    "text_kept": "captions kept",
    "item_mass": "item mass",
    "leak": "leak rate",
}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of some runs."""

    mean: float
    deviation: float | None
    """None: of one run alone."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Summary:
    """One variant in one world at one budget."""

    variant: str
    runs: int
    metrics: dict[str, Spread]
    """By the keys of `COLUMNS`, and ``steps`` and ``seconds`` of training."""
    steps_to_recover: Spread | None
    """Steps until RECOVERED of the teacher's accuracy, over the runs that got there."""
    recovered: int
    """How many did."""
    failure: str | None = None
    """Why runs failed, where some did and none succeeded."""


@dataclass(frozen=True)
class Start:
    """What teacher and student could do before, over students."""

    teacher: Spread
    before: dict[str, Spread]
    """By names of ``evaluate``."""


@dataclass(frozen=True)
class Group:
    """All that is compared with each other."""

    world: str
    budget: str
    students: tuple[int, ...]
    start: Start
    summaries: list[Summary]

    @property
    def columns(self) -> dict[str, str]:
        """Those of `COLUMNS` that are shown."""
        absent = {key for key in (f"recall_{k}_kept" for k in LONG_LISTS) if KEPT[key] not in self.start.before}
        return {key: label for key, label in COLUMNS.items() if key not in absent}


def steps_to_recover(curve: Sequence[tuple[float, float]], teacher: float) -> float | None:
    """The first step of a curve at which accuracy is RECOVERED of the teacher's; None: there is none."""
    return next((step for step, accuracy in curve if accuracy >= RECOVERED * teacher), None)


def summarise(records: Sequence[Record]) -> list[Group]:
    """The groups of results that the variants of today made: one per world and budget, over all students, and where
    there are several of these, one for each student behind it. Students differ more than objectives do, so the one over
    all of them compares only what ran on all of them.
    """
    records = [record for record in records if _is_current(record)]
    starts = {
        (run.world, run.student_seed, run.variant): record["metrics"]
        for record in records
        if (run := run_of(record)).is_measurement and record["status"] == DONE
    }
    trained = [
        (run, record)
        for record in records
        if not (run := run_of(record)).is_measurement and (run.world, run.student_seed, BEFORE) in starts
    ]
    groups = []
    for world, budget in dict.fromkeys((run.world, run.budget) for run, _ in trained):
        own = [(run, record) for run, record in trained if (run.world, run.budget) == (world, budget)]
        students = sorted({run.student_seed for run, _ in own})
        for some in [students, *([student] for student in students if len(students) > 1)]:
            groups.append(_group(world, budget, some, [pair for pair in own if pair[0].student_seed in some], starts))
    return groups


def _is_current(record: Record) -> bool:
    run = run_of(record)
    known = run.is_measurement or run.variant in VARIANTS
    return known and record["settings"] == run.settings


def _group(
    world: str, budget: str, students: list[int], own: list[tuple[Run, Record]], starts: dict[Any, dict[str, float]]
) -> Group:
    before = [starts[world, student, BEFORE] for student in students]
    teacher = [starts[world, student, TEACHER]["general_accuracy"] for student in students]
    names = [*AS_THEY_ARE.values(), *KEPT.values()]
    start = Start(
        Spread.of(teacher), {n: Spread.of([b[n] for b in before]) for n in names if all(n in b for b in before)}
    )
    summaries = [
        _summary(world, variant, pairs, starts)
        for variant in VARIANTS
        if (pairs := [pair for pair in own if pair[0].variant == variant])
        and {run.student_seed for run, record in pairs if record["status"] == DONE} in (set(students), set())
    ]
    return Group(world, budget, tuple(students), start, summaries)


def _summary(world: str, variant: str, pairs: list[tuple[Run, Record]], starts: dict[Any, dict[str, float]]) -> Summary:
    done = [(run, record) for run, record in pairs if record["status"] == DONE]
    failures = [record["message"] for _, record in pairs if record["status"] == FAILED]
    values: dict[str, list[float]] = {}
    reached = []
    for run, record in done:
        before = starts[world, run.student_seed, BEFORE]
        teacher = starts[world, run.student_seed, TEACHER]["general_accuracy"]
        for column, value in _columns_of(record, before).items():
            values.setdefault(column, []).append(value)
        reached.append(steps_to_recover(record["curve"], teacher))
    got_there = [step for step in reached if step is not None]
    return Summary(
        variant,
        len(done),
        {column: Spread.of(of_runs) for column, of_runs in values.items()},
        Spread.of(got_there) if got_there else None,
        len(got_there),
        failures[0].splitlines()[0] if failures and not done else None,
    )


def _columns_of(record: Record, before: dict[str, float]) -> dict[str, float]:
    """What one run adds to the columns; a metric that was 0 before cannot be kept."""
    after = record["metrics"]
    metrics = {column: after[name] for column, name in AS_THEY_ARE.items() if name in after}
    metrics |= {
        column: after[name] / before[name] for column, name in KEPT.items() if before.get(name) and name in after
    }
    return metrics | {"steps": record["steps"], "seconds": record["seconds"]}


# ---------------------------------------------------------------------- text


def table_text(groups: Sequence[Group]) -> str:
    """A heading, a line on the start and a table per group, in Markdown."""
    return "\n\n".join(map(_group_text, groups)) or "no results yet"


def _group_text(group: Group) -> str:
    seeds = ", ".join(map(str, group.students))
    heading = f"### {group.world}, {group.budget}, student {'seeds' if len(group.students) > 1 else 'seed'} {seeds}"
    head = ["objective", "runs", *group.columns.values(), f"steps to {RECOVERED:.0%}", "steps", "seconds"]
    rows = [head, ["---"] * len(head), *(_row(summary, group.columns) for summary in group.summaries)]
    failed = [f"- {VARIANTS[s.variant].label}: {s.failure}" for s in group.summaries if s.failure]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    parts = [heading, _start_text(group.start), table]
    return "\n\n".join([*parts, "Did not run:\n\n" + "\n".join(failed)] if failed else parts)


def _start_text(start: Start) -> str:
    labels = {AS_THEY_ARE.get(key) or KEPT[key]: label.removesuffix(" kept") for key, label in COLUMNS.items()}
    before = ", ".join(f"{label} {_shown(start.before[n])}" for n, label in labels.items() if n in start.before)
    return f"Teacher: general accuracy {_shown(start.teacher)}.\nStudent before: {before}."


def _row(summary: Summary, columns: Iterable[str]) -> list[str]:
    cells = [VARIANTS[summary.variant].label, str(summary.runs)]
    for column in columns:
        spread = summary.metrics.get(column)
        cells.append("–" if spread is None else _shown(spread, percent=column in KEPT))
    return [*cells, _recovery(summary), *(_whole(summary.metrics.get(name)) for name in ("steps", "seconds"))]


def _recovery(summary: Summary) -> str:
    if not summary.runs:
        return "–"
    if summary.steps_to_recover is None:
        return "never"
    share = "" if summary.recovered == summary.runs else f" ({summary.recovered} of {summary.runs})"
    return _whole(summary.steps_to_recover) + share


def _whole(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.0f}" + ("" if not spread.deviation else f" ± {spread.deviation:.0f}")


def _shown(spread: Spread, percent: bool = False) -> str:
    """Shares in percent or with three places, small numbers with two digits."""

    def text(value: float) -> str:
        if percent:
            return f"{100 * value:.0f}"
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"

    return text(spread.mean) + ("" if spread.deviation is None else f" ± {text(spread.deviation)}") + "%" * percent
