"""The table as a picture: a line per variant, a dot per metric, a whisker of one standard deviation.

In: the groups of `table`. Out: SVG text that needs nothing else, readable on light and dark pages.
"""

from collections.abc import Sequence
from html import escape

from experiments.retention.table import Group, Spread, Summary
from experiments.retention.variants import VARIANTS

DOTS = {
    "general": ("general accuracy", "#1f77b4"),
    "recall_1_kept": ("R@1 kept", "#d62728"),
    "free_kept": ("unconstrained items kept", "#e8a33d"),
}
"""Metrics that are shown, with label and colour; all are shares."""

WIDTH, LABELS, RIGHT = 760, 250, 24
ROW, HEAD, FOOT = 22, 58, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.soft{fill:#666}"
    ".end{text-anchor:end}.mid{text-anchor:middle}line{stroke-width:1.5}line.grid{stroke:#ddd;stroke-width:1}"
)
HIGHEST = 1.1
"""Share at the right end: what is kept can exceed what there was."""


def plot(groups: Sequence[Group]) -> str:
    """A panel per group, over all students; those of single students are left to the table."""
    shown = [group for number, group in enumerate(groups) if _is_overall(group, groups[:number])]
    parts, top = [], 0
    for group in shown:
        ran = [summary for summary in group.summaries if summary.runs]
        parts.append(_panel(group, ran, top))
        top += HEAD + ROW * len(ran) + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(top, 1)}" role="img">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{max(top, 1)}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _is_overall(group: Group, earlier: Sequence[Group]) -> bool:
    return not any((other.world, other.budget) == (group.world, group.budget) for other in earlier)


def _x(share: float) -> float:
    return LABELS + min(max(share, 0.0), HIGHEST) / HIGHEST * (WIDTH - LABELS - RIGHT)


def _panel(group: Group, summaries: Sequence[Summary], top: int) -> str:
    bottom = top + HEAD + ROW * len(summaries)
    parts = [f'<text x="12" y="{top + 20}" font-weight="600">{escape(group.world)}, {escape(group.budget)}</text>']
    for number, (label, colour) in enumerate(DOTS.values()):
        x = LABELS + 170 * number
        parts.append(f'<circle cx="{x + 5}" cy="{top + 36}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{top + 40}">{escape(label)}</text>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="{top + HEAD - 6}" y2="{bottom}" stroke="#ddd"/>'
        )
        parts.append(f'<text class="soft mid" x="{_x(tick):.1f}" y="{bottom + 16}">{tick:.0%}</text>')
    for number, summary in enumerate(summaries):
        parts.append(_line(summary, top + HEAD + ROW * number + ROW / 2))
    return "".join(parts)


def _line(summary: Summary, y: float) -> str:
    parts = [f'<text class="end" x="{LABELS - 12}" y="{y + 4:.1f}">{escape(VARIANTS[summary.variant].label)}</text>']
    for number, (column, (label, colour)) in enumerate(DOTS.items()):
        if column in summary.metrics:
            # Side by side, so that equal metrics stay in sight.
            parts.append(_dot(summary.metrics[column], y + 3.5 * (number - 1), label, colour))
    return "".join(parts)


def _dot(spread: Spread, y: float, label: str, colour: str) -> str:
    whisker, deviation = "", spread.deviation or 0.0
    if deviation:
        left, right = _x(spread.mean - deviation), _x(spread.mean + deviation)
        whisker = (
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="1.5"/>'
        )
    text = f"{label}: {spread.mean:.1%}" + (f" ± {deviation:.1%}" if deviation else "")
    dot = (
        f'<circle cx="{_x(spread.mean):.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(text)}</title></circle>'
    )
    return whisker + dot
