"""The result of a run as one HTML page that opens without a network.

In:  the summary (``teacher``, ``before``, ``after``: metrics of ``evaluate``), the run's ``metrics.jsonl``, sampled
answers before and after. Out: ``report.html``: table, curves, answers token by token. Everything is inline, and there
is no script. A curve is drawn only where its metrics exist.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from recipe.onpolicy_distill.quickstart.charts import COLOURS, Series, line_chart, stacked_bars
from recipe.onpolicy_distill.quickstart.scoreboard_table import COLUMNS, comparison, popularity_line

TEMPLATE = Path(__file__).with_name("report.html")
STRONG_ADVANTAGE = 3.0
"""Nats at which a token's colour is at its fullest."""
SAMPLES_SHOWN = 12
NOT_STAGES = ("step", "testing", "save_checkpoint")
"""Timings that are no part of a step."""
TASK_SUFFIX = "/reward"

Curves = dict[str, list[tuple[float, float]]]
"""Figure to (step, value), by step."""


def write_report(
    path: str | Path, summary: Mapping[str, Any], metrics_jsonl: str | Path, samples: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the page and return its path.

    Args:
        path: the HTML file.
        summary: ``teacher``, ``before`` and ``after`` with metrics of ``evaluate``, all optional; ``seed``, ``steps``,
            ``mode``, ``seconds`` (a number, or a dict with ``total``) and ``title`` are shown where they are there.
        metrics_jsonl: what ``trainer.logger=file`` wrote; may be absent.
        samples: see `pair_samples`.
    """
    curves = read_curves(metrics_jsonl)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(str(summary.get("title", "Forget, recover, and what it cost"))),
        subtitle=escape(_subtitle(summary)),
        table=_table(summary),
        charts=_charts(curves, summary),
        samples=_samples(samples),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def pair_samples(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples of two evaluations of the same prompts, side by side; those that held an extended token first.

    Returns:
        dicts with ``source``, ``prompt``, ``wanted``, and ``before`` and ``after``: dicts with ``exact`` and
        ``tokens`` as ``evaluate`` gives them. Prompts that only one of the two has are left out.
    """
    later = {sample["uuid"]: sample for sample in after}
    pairs = [
        {key: sample[key] for key in ("source", "prompt", "wanted")}
        | {when: {key: one[key] for key in ("exact", "tokens")} for when, one in (("before", sample), ("after", other))}
        for sample in before
        if (other := later.get(sample["uuid"])) is not None
    ]
    return sorted(pairs, key=lambda pair: not any(token["extended"] for token in pair["before"]["tokens"]))


def read_curves(path: str | Path) -> Curves:
    """Every finite metric of a ``metrics.jsonl`` by step; of a step that comes twice the last value. Reading ends at a
    line that was not finished.
    """
    path = Path(path)
    by_name: dict[str, dict[float, float]] = {}
    for record in _records(path) if path.is_file() else ():
        for name, value in record["data"].items():
            if isinstance(value, int | float) and math.isfinite(value):
                by_name.setdefault(name, {})[record["step"]] = value
    return {name: sorted(values.items()) for name, values in by_name.items()}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        yield record


def _subtitle(summary: Mapping[str, Any]) -> str:
    seconds = summary.get("seconds")
    total = seconds.get("total") if isinstance(seconds, Mapping) else seconds
    parts = [f"{summary['steps']} steps"] if "steps" in summary else []
    parts += [f"{key} {summary[key]}" for key in ("seed", "objective", "mode", "rehearsal") if key in summary]
    parts += [f"{total:.0f} s"] if isinstance(total, int | float) else []
    return " · ".join(parts)


# ---------------------------------------------------------------------- table


def _table(summary: Mapping[str, Any]) -> str:
    rows = comparison(summary)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr{' class=task' if row[0].startswith(' ') else ''}>"
        + "".join(f"<td>{escape(cell.strip())}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    popular = escape(popularity_line(summary))
    return f'<h2>Scoreboard</h2><div class="panel scroll"><table><tr>{head}</tr>{body}</table></div>' + (
        f'<p class="soft">{popular}</p>' if popular else ""
    )


# ---------------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Chart:
    title: str
    note: str
    svg: str
    series: Sequence[Series]


def _charts(curves: Curves, summary: Mapping[str, Any]) -> str:
    builders: tuple[Callable[[], _Chart | None], ...] = (
        lambda: _ability(curves, summary, "General accuracy", "general_accuracy", _is_general),
        lambda: _ability(curves, summary, "Recommendation", "rec_recall", lambda source: not _is_general(source)),
        lambda: _plain(curves, "Reverse KL to the teacher", "nats a token", ("distill/reverse_kl", "val/reverse_kl")),
        lambda: _plain(
            curves,
            "Leak",
            "share of answers with an item token",
            ("distill/extend_seq_ratio", "val/extend_seq_ratio"),
            percent=True,
        ),
        lambda: _plain(curves, "Entropy", "nats a token", ("distill/entropy",)),
        lambda: _stages(curves),
    )
    drawn = [chart for build in builders if (chart := build()) is not None]
    if not drawn:
        return ""
    return f'<h2>Over the steps</h2><div class="charts">{"".join(map(_chart_html, drawn))}</div>'


def _is_general(source: str) -> bool:
    return not source.lower().startswith(("rec_", "rec/", "recif"))


def _ability(
    curves: Curves, summary: Mapping[str, Any], title: str, metric: str, belongs: Callable[[str], bool]
) -> _Chart | None:
    """Validation by source, their mean, the teacher's level, and the scoreboard before and after as large dots."""
    sources = {
        name.removeprefix("val/").removesuffix(TASK_SUFFIX): points
        for name, points in sorted(curves.items())
        if name.startswith("val/") and name.endswith(TASK_SUFFIX) and name != "val/reward"
    }
    series = [Series(source, points) for source, points in sources.items() if belongs(source)]
    ends = _ends(curves, summary, metric)
    level = (summary.get("teacher") or {}).get(metric)
    if level is not None and ends:
        series.append(Series("teacher", [(ends[0][0], level), (ends[-1][0], level)], dashed=True))
    if ends:
        series.append(Series("scoreboard", ends, markers=True))
    if not series:
        return None
    note = "exact answers" if metric == "general_accuracy" else "dots Recall@5, curves exact answers of any kind"
    return _Chart(title, note, line_chart(series, percent=True, highest=1.0), series)


def _ends(curves: Curves, summary: Mapping[str, Any], metric: str) -> list[tuple[float, float]]:
    """The scoreboard's metric at the first and last step, and at those between that were measured."""
    last = max((points[-1][0] for points in curves.values()), default=float(summary.get("steps", 1)))
    between = [(float(step), metrics) for step, metrics in (summary.get("half_way") or {}).items()]
    pairs = ((0.0, summary.get("before")), *between, (last, summary.get("after")))
    return [(step, metrics[metric]) for step, metrics in pairs if metrics and metrics.get(metric) is not None]


def _plain(curves: Curves, title: str, note: str, names: Sequence[str], *, percent: bool = False) -> _Chart | None:
    labels = {"distill": "training", "val": "validation"}
    series = [Series(labels[name.split("/")[0]], curves[name]) for name in names if name in curves]
    if not series:
        return None
    return _Chart(title, note, line_chart(series, percent=percent), series)


def _stages(curves: Curves) -> _Chart | None:
    """Seconds of each stage of a step; the stages that take most time first."""
    stages = {
        name.removeprefix("timing_s/"): points
        for name, points in curves.items()
        if name.startswith("timing_s/") and name.count("/") == 1 and name.removeprefix("timing_s/") not in NOT_STAGES
    }
    if not stages:
        return None
    largest = sorted(stages, key=lambda name: -sum(value for _, value in stages[name]))
    series = [Series(name, stages[name]) for name in largest[:COLOURS]]
    return _Chart("Step time by stage", "seconds", stacked_bars(series), series)


def _chart_html(chart: _Chart) -> str:
    keys = "".join(
        f'<span class="key s{number % COLOURS}{" dot" if curve.markers else ""}">{escape(curve.name)}</span>'
        for number, curve in enumerate(chart.series)
    )
    return (
        f'<figure class="panel"><figcaption>{escape(chart.title)} '
        f'<span class="soft" style="font-weight:400">{escape(chart.note)}</span></figcaption>'
        f'{chart.svg}<div class="keys">{keys}</div></figure>'
    )


# ---------------------------------------------------------------------- samples


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    legend = (
        '<div class="legend panel">'
        f'<span>advantage <span class="soft">the teacher finds the token less likely</span>'
        f'<span class="ramp"></span><span class="soft">more likely than the student does; full colour from '
        f"±{STRONG_ADVANTAGE:g} nats</span></span>"
        '<span><span class="t ext">item token</span> the teacher does not know it</span>'
        '<span><span class="t masked">masked</span> not trained on: the teacher’s context is void there</span>'
        "</div>"
    )
    shown = "".join(map(_pair, samples[:SAMPLES_SHOWN]))
    return f"<h2>Sampled answers, before and after</h2>{legend}{shown}"


def _pair(sample: Mapping[str, Any]) -> str:
    answers = "".join(
        f'<div class="soft">{when}</div><div class="answer">{_tokens(sample[when]["tokens"])}</div>'
        for when in ("before", "after")
        if when in sample
    )
    return (
        f'<div class="sample panel"><h3>{escape(str(sample["prompt"]))} <span class="soft">'
        f"→ {escape(str(sample['wanted']))} · {escape(str(sample['source']))}</span></h3>"
        f'<div class="pair">{answers}</div></div>'
    )


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> str:
    return "".join(map(_token, tokens)) or '<span class="soft">nothing</span>'


def _token(token: Mapping[str, Any]) -> str:
    classes, style, hint = ["t"], "", []
    advantage = token.get("advantage")
    if token.get("extended"):
        classes.append("ext")
        hint.append("an item token")
    if token.get("masked"):
        classes.append("masked")
        hint.append("not trained on")
    elif advantage is not None:
        classes.append("up" if advantage > 0 else "down")
        style = f' style="--a:{min(1.0, abs(advantage) / STRONG_ADVANTAGE):.2f}"'
        hint.append(f"advantage {advantage:+.2f}")
    hint += [f"log p of the {who} {token[f'{who}_log_prob']:.2f}" for who in _scorers(token)]
    text = escape(token["text"].replace("\n", "⏎")) or "∅"
    return f'<span class="{" ".join(classes)}"{style} title="{escape(", ".join(hint))}">{text}</span>'


def _scorers(token: Mapping[str, Any]) -> list[str]:
    """Whose log-prob of a token is worth showing: the teacher's is a stand-in where it does not know the token."""
    return [
        who
        for who in ("student", "teacher")
        if f"{who}_log_prob" in token and not (who == "teacher" and (token.get("extended") or token.get("masked")))
    ]
