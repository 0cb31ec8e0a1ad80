"""Teacher, student before and student after, side by side.

In:  the metrics of ``evaluate`` for each. Out: rows of a table, for the console and for the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[str, str, str, str, str]
"""Cells in the order of `COLUMNS`."""

COLUMNS: Row = ("", "teacher", "before", "after", "kept or regained")


@dataclass(frozen=True)
class Line:
    """A metric that is shown, and what its change is called."""

    key: str
    label: str
    verdict: str
    """``regained``: share of the gap between before and teacher that was closed. ``kept``: after over before.
    ``removed``: share of before that is gone."""


LINES = (
    Line("general_accuracy", "General tasks, exact answers", "regained"),
    Line("rec_recall_at_1", "Recommendation, Recall@1", "kept"),
    Line("rec_recall", "Recommendation, Recall@5", "kept"),
    Line("rec_recall_at_10", "Recommendation, Recall@10", "kept"),
    Line("free_rate", "Recommendation, unconstrained exact item", "kept"),
    Line("rec_text_accuracy", "Item to text, exact answers", "kept"),
    Line("leak_rate", "General answers with an item token", "removed"),
    Line("extend_mass", "Probability of item tokens", "removed"),
    Line("reverse_kl", "Reverse KL to the teacher, nats a token", "removed"),
)
NOT_SHARES = ("extend_mass", "reverse_kl")
"""Metrics not shown in percent."""


def comparison(summary: Mapping[str, Any]) -> list[Row]:
    """One row per metric that before or after has, and one per general task (indented), as text."""
    stages = [summary.get(name) or {} for name in ("teacher", "before", "after")]
    rows: list[Row] = []
    for line in LINES:
        values = [metrics.get(line.key) for metrics in stages]
        if values[1] is None and values[2] is None:
            continue
        rows.append(_row(line.label, values, line.verdict, line.key not in NOT_SHARES))
        if line.key == "general_accuracy":
            by_task = [metrics.get("general_accuracy_by_task") or {} for metrics in stages]
            for task in sorted(set().union(*by_task)):
                rows.append(_row(f"  {task}", [accuracies.get(task) for accuracies in by_task], "regained", True))
    return rows


def _row(label: str, values: Sequence[float | None], kind: str, is_share: bool) -> Row:
    teacher, before, after = values
    shown = [_number(value, is_share) for value in values]
    return label, shown[0], shown[1], shown[2], verdict(kind, teacher, before, after)


def verdict(kind: str, teacher: float | None, before: float | None, after: float | None) -> str:
    """The change in percent, or nothing where it means nothing."""
    if before is None or after is None:
        return ""
    if kind == "regained":
        if teacher is None or teacher <= before:
            return ""
        return f"{(after - before) / (teacher - before):.0%} regained"
    if before <= 0:
        return ""
    return f"{after / before:.0%} kept" if kind == "kept" else f"{1 - after / before:.1%} removed"


def _number(value: float | None, is_share: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if is_share else f"{value:.3g}"


def comparison_table(summary: Mapping[str, Any]) -> str:
    """The table for the console."""
    rows = [COLUMNS, *comparison(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def popularity_line(summary: Mapping[str, Any]) -> str:
    """What the same items for every user would reach, to read recall against; empty where it was not measured."""
    metrics = summary.get("popularity") or {}
    if "rec_recall" not in metrics:
        return ""
    return (
        "Recommending the most popular items to everyone: "
        f"Recall@1 {metrics['rec_recall_at_1']:.1%}, Recall@5 {metrics['rec_recall']:.1%}"
    )
