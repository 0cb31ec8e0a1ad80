"""The scoreboard of a world: teacher, student before and student after, side by side, and the most popular items.

In:  a world and its models, or the metrics of ``evaluate`` for each. Out: metrics, and rows of a table for the console
and for the report.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from recipe.onpolicy_distill.quickstart.world import World
from recipe.onpolicy_distill.scoreboard.measures import KS, ranking_metrics

if TYPE_CHECKING:
    from recipe.onpolicy_distill.evaluate import Evaluation

COLUMNS = ("", "teacher", "before", "after", "kept or regained")
LINES = (
    ("general_accuracy", "General tasks, exact answers", "regained"),
    ("rec_recall_at_1", "Recommendation, Recall@1", "kept"),
    ("rec_recall", "Recommendation, Recall@5", "kept"),
    ("rec_recall_at_10", "Recommendation, Recall@10", "kept"),
    ("free_rate", "Recommendation, unconstrained exact item", "kept"),
    ("rec_text_accuracy", "Item to text, exact answers", "kept"),
    ("leak_rate", "General answers with an item token", "removed"),
    ("extend_mass", "Probability of item tokens", "removed"),
    ("reverse_kl", "Reverse KL to the teacher, nats a token", "removed"),
)
"""Metrics that are shown, their labels, and what their change is called. ``regained``: share of the gap between before
and teacher that was closed. ``kept``: after over before. ``removed``: share of before that is gone."""
NOT_SHARES = ("extend_mass", "reverse_kl")
"""Metrics not shown in percent."""


def score(
    world: World, model: Path, teacher: Path, *, general: bool = True, rec: bool = True, **settings: Any
) -> "Evaluation":
    """``evaluate`` for one model on the general tasks, on recommendation, or on both; with further ``settings``."""
    from recipe.onpolicy_distill.evaluate import EvaluationConfig, evaluate

    if general:
        settings["general"] = str(world.general_test)
    if rec:
        settings |= {"rec": str(world.rec_test), "catalogue": str(world.catalogue)}
        settings["extend_vocab_start_token"] = world.extend_vocab_start_token
    if model != teacher:
        settings["teacher"] = str(teacher)
    return evaluate(EvaluationConfig(model=str(model), **settings))


def popularity_metrics(world: World) -> dict[str, float]:
    """Recall and Pass of the items that the training histories hold most often, over the test users."""
    catalogue = pq.read_table(world.catalogue, columns=["item", "sid", "popularity"]).to_pylist()
    items = {row["item"]: tuple(row["sid"]) for row in catalogue}
    favourites = sorted(catalogue, key=lambda row: -row["popularity"])[: max(KS)]
    rows = pq.read_table(world.rec_test, columns=["source", "metadata"]).to_pylist()
    targets = [{items[json.loads(row["metadata"])["target_item"]]} for row in rows if row["source"] == "rec_next"]
    return ranking_metrics([[items[row["item"]] for row in favourites]] * len(targets), targets)


def comparison(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row per metric that before or after has, and one per general task (indented): texts by COLUMNS."""
    stages = [summary.get(name) or {} for name in COLUMNS[1:4]]
    rows = []
    for metric, label, kind in LINES:
        values = [metrics.get(metric) for metrics in stages]
        if values[1:] == [None, None]:
            continue
        rows.append(_row(label, values, kind, metric not in NOT_SHARES))
        if metric == "general_accuracy":
            by_task = [metrics.get("general_accuracy_by_task") or {} for metrics in stages]
            for task in sorted(set().union(*by_task)):
                rows.append(_row(f"  {task}", [accuracies.get(task) for accuracies in by_task], kind, True))
    return rows


def _row(label: str, values: Sequence[float | None], kind: str, is_share: bool) -> list[str]:
    shown = ["–" if value is None else f"{value:.1%}" if is_share else f"{value:.3g}" for value in values]
    return [label, *shown, verdict(kind, *values)]


def verdict(kind: str, teacher: float | None, before: float | None, after: float | None) -> str:
    """The change in percent, or nothing where it means nothing."""
    if before is None or after is None:
        return ""
    if kind == "regained":
        gap = 0.0 if teacher is None else teacher - before
        return f"{(after - before) / gap:.0%} regained" if gap > 0 else ""
    if before <= 0:
        return ""
    return f"{after / before:.0%} kept" if kind == "kept" else f"{1 - after / before:.1%} removed"


def comparison_table(summary: Mapping[str, Any]) -> str:
    """The table for the console."""
    rows = [list(COLUMNS), *comparison(summary)]
    label_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([label.ljust(label_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for label, *cells in rows
    )


def popularity_line(summary: Mapping[str, Any]) -> str:
    """What the same items for every user would reach, to read recall against; empty where it was not measured."""
    metrics = summary.get("popularity") or {}
    if not metrics:
        return ""
    recalls = f"Recall@1 {metrics['rec_recall_at_1']:.1%}, Recall@5 {metrics['rec_recall']:.1%}"
    return f"Recommending the most popular items to everyone: {recalls}"
