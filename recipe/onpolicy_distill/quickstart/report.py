"""The result of a run as one HTML page that opens without a network.

In:  the summary (``teacher``, ``before``, ``after``: metrics of ``evaluate``), the run's ``metrics.jsonl``, sampled
answers before and after. Out: ``report.html``: table, curves, answers token by token. Everything is inline, and there
is no script. A curve is drawn only where its metrics exist.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from string import Template
from typing import Any

import verl
from recipe.onpolicy_distill.quickstart.charts import COLOURS, Series, line_chart
from recipe.onpolicy_distill.quickstart.scoreboard import COLUMNS, comparison, popularity_line
from verl.viewer.run_data import read_curves

TEMPLATE = Path(__file__).with_name("report.html")
STRONG_ADVANTAGE = 3.0
"""Nats at which a token's colour is at its fullest."""
SAMPLES_SHOWN = 12
NOT_STAGES = ("step", "testing", "save_checkpoint")
"""Timings that are no part of a step."""

Curves = dict[str, list[tuple[float, float]]]
"""Metric to (step, value), by step."""


def write_report(
    path: str | Path, summary: Mapping[str, Any], metrics_jsonl: str | Path, samples: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the page and return its path.

    Args:
        path: the HTML file.
        summary: ``teacher``, ``before`` and ``after`` with metrics of ``evaluate``, ``half_way`` with such metrics by
            step, ``popularity``; ``steps``, ``seed``, ``objective``, ``mode``, ``rehearsal`` and ``seconds`` (a dict
            with ``total``) are shown where they are there. All are optional.
        metrics_jsonl: what ``trainer.logger=file`` wrote; may be absent.
        samples: see `pair_samples`.
    """
    subtitle = [f"{summary['steps']} steps"] if "steps" in summary else []
    subtitle += [f"{key} {summary[key]}" for key in ("seed", "objective", "mode", "rehearsal") if key in summary]
    subtitle += [f"{summary['seconds']['total']:.0f} s"] if "seconds" in summary else []
    subtitle.append(f"kai-verl {verl.__version__}")
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Forget, recover, and what it cost",
        subtitle=escape(" · ".join(subtitle)),
        table=_table(summary),
        popularity=escape(popularity_line(summary)),
        charts=_charts(finite_curves(Path(metrics_jsonl)), summary),
        strongest=f"{STRONG_ADVANTAGE:g}",
        samples="".join(map(_pair, samples[:SAMPLES_SHOWN])),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def pair_samples(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples of two evaluations of the same prompts, side by side; those that held an extended token first.

    Returns:
        dicts with ``source``, ``prompt``, ``wanted``, and ``before`` and ``after``: the tokens as ``evaluate`` gives
        them. Prompts that only one of the two has are left out.
    """
    later = {sample["uuid"]: sample["tokens"] for sample in after}
    pairs = [
        {**{key: sample[key] for key in ("source", "prompt", "wanted")}, "before": sample["tokens"], "after": tokens}
        for sample in before
        if (tokens := later.get(sample["uuid"])) is not None
    ]
    return sorted(pairs, key=lambda pair: not any(token["extended"] for token in pair["before"]))


def finite_curves(metrics_jsonl: Path) -> Curves:
    """Every metric that has finite values, without the steps at which it has none."""
    found: Curves = {}
    for name, (steps, values) in read_curves(metrics_jsonl).items():
        points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if finite := [(float(step), value) for step, value in points if isfinite(value)]:
            found[name] = finite
    return found


def _table(summary: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = [
        f"<tr{' class=task' if row[0].startswith(' ') else ''}>"
        + "".join(f"<td>{escape(cell.strip())}</td>" for cell in row)
        + "</tr>"
        for row in comparison(summary)
    ]
    return f"<tr>{head}</tr>{''.join(rows)}"


# ---------------------------------------------------------------------- curves


def _charts(curves: Curves, summary: Mapping[str, Any]) -> str:
    """A chart for each entry that has a curve: title, note, series, and how they are drawn."""
    share: dict[str, Any] = {"percent": True}
    ability = share | {"highest": 1.0}
    answers = _abilities(curves, summary, "general_accuracy", is_general=True)
    items = _abilities(curves, summary, "rec_recall", is_general=False)
    stages = {
        name.removeprefix("timing_s/"): points
        for name, points in curves.items()
        if name.startswith("timing_s/") and name.count("/") == 1 and name.removeprefix("timing_s/") not in NOT_STAGES
    }
    seconds = {name: sum(value for _, value in points) for name, points in stages.items()}
    largest = sorted((name for name in stages if seconds[name] > 0), key=lambda name: -seconds[name])[:COLOURS]
    charts: tuple[tuple[str, str, list[Series], dict[str, Any]], ...] = (
        ("General accuracy", "exact answers", answers, ability),
        ("Recommendation", "dots Recall@5, curves exact answers of any kind", items, ability),
        ("Reverse KL to the teacher", "nats a token", _training_and_validation(curves, "reverse_kl"), {}),
        ("Leak", "share of answers with an item token", _training_and_validation(curves, "extend_seq_ratio"), share),
        ("Entropy", "nats a token", _training_and_validation(curves, "entropy"), {}),
        ("Step time by stage", "seconds", [Series(name, stages[name]) for name in largest], {}),
    )
    return "".join(_chart(title, note, series, **drawn) for title, note, series, drawn in charts if series)


def _abilities(curves: Curves, summary: Mapping[str, Any], metric: str, is_general: bool) -> list[Series]:
    """Validation by source, the teacher's level, and the scoreboard before, half-way and after as large dots."""
    sources = {
        name.removeprefix("val/").removesuffix("/reward"): points
        for name, points in sorted(curves.items())
        if name.startswith("val/") and name.endswith("/reward") and name != "val/reward"
    }
    series = [Series(name, points) for name, points in sources.items() if name.startswith("rec_") != is_general]
    last = max((points[-1][0] for points in curves.values()), default=float(summary.get("steps", 1)))
    half_way = [(float(step), metrics) for step, metrics in (summary.get("half_way") or {}).items()]
    measured = [(0.0, summary.get("before") or {}), *half_way, (last, summary.get("after") or {})]
    ends = [(step, metrics[metric]) for step, metrics in measured if metrics.get(metric) is not None]
    level = (summary.get("teacher") or {}).get(metric)
    if level is not None and ends:
        series.append(Series("teacher", [(ends[0][0], level), (ends[-1][0], level)], dashed=True))
    return [*series, Series("scoreboard", ends, markers=True)] if ends else series


def _training_and_validation(curves: Curves, metric: str) -> list[Series]:
    names = {"training": f"distill/{metric}", "validation": f"val/{metric}"}
    return [Series(label, curves[name]) for label, name in names.items() if name in curves]


def _chart(title: str, note: str, series: Sequence[Series], **drawn: Any) -> str:
    keys = "".join(
        f'<span class="key s{number % COLOURS}{" dot" if curve.markers else ""}">{escape(curve.name)}</span>'
        for number, curve in enumerate(series)
    )
    return (
        f'<figure class="panel"><figcaption>{escape(title)} '
        f'<span class="soft" style="font-weight:400">{escape(note)}</span></figcaption>'
        f'{line_chart(series, **drawn)}<div class="keys">{keys}</div></figure>'
    )


# ---------------------------------------------------------------------- samples


def _pair(sample: Mapping[str, Any]) -> str:
    answers = "".join(
        f'<div class="soft">{when}</div><div class="answer">{"".join(map(_token, sample[when]))}</div>'
        for when in ("before", "after")
    )
    return (
        f'<div class="sample panel"><h3>{escape(str(sample["prompt"]))} <span class="soft">'
        f"→ {escape(str(sample['wanted']))} · {escape(str(sample['source']))}</span></h3>"
        f'<div class="pair">{answers}</div></div>'
    )


def _token(token: Mapping[str, Any]) -> str:
    """One token, coloured by its advantage; a pointer over it shows the numbers that mean something for it."""
    classes, style, hint = ["t"], "", []
    advantage = token.get("advantage")
    if token["extended"]:
        classes.append("ext")
        hint.append("an item token")
    if token["masked"]:
        classes.append("masked")
        hint.append("not trained on")
    elif advantage is not None:
        classes.append("up" if advantage > 0 else "down")
        style = f' style="--a:{min(1.0, abs(advantage) / STRONG_ADVANTAGE):.2f}"'
        hint.append(f"advantage {advantage:+.2f}")
    # The teacher's is a stand-in where it does not know the token.
    scorers = ["student"] if token["extended"] or token["masked"] else ["student", "teacher"]
    hint += [f"log p of the {who} {token[f'{who}_log_prob']:.2f}" for who in scorers if f"{who}_log_prob" in token]
    text = escape(token["text"].replace("\n", "⏎")) or "∅"
    return f'<span class="{" ".join(classes)}"{style} title="{escape(", ".join(hint))}">{text}</span>'
