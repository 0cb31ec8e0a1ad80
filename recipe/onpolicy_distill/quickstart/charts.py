"""Line and bar charts as inline SVG.

In:  series of (step, value). Out: SVG text that takes its colours from the page's CSS variables, so that it reads in
light and dark; a pointer over a mark shows its numbers. No script.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30
COLOURS = 8
"""How many series colours the page defines (``--series-0`` and on)."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[Point]
    """(step, value), by step."""
    dashed: bool = False
    markers: bool = False
    """Marks alone, without a line."""


def line_chart(series: Sequence[Series], *, percent: bool = False, highest: float | None = None) -> str:
    """Curves over steps, on a scale that begins at 0, or below where values do.

    Args:
        percent: values are shares, and shown in percent.
        highest: where the scale ends, at least; None: just above the values.
    """
    frame = _Frame.around([point for curve in series for point in curve.points], percent, highest)
    marks = [_curve(curve, number % COLOURS, frame) for number, curve in enumerate(series)]
    return _svg(frame, marks)


def stacked_bars(series: Sequence[Series]) -> str:
    """Values of each step on top of each other, first series lowest."""
    steps = sorted({step for curve in series for step, _ in curve.points})
    values = [dict(curve.points) for curve in series]
    totals = [(step, sum(column.get(step, 0.0) for column in values)) for step in steps]
    frame = _Frame.around([*totals, (steps[0] - 0.5, 0.0), (steps[-1] + 0.5, 0.0)])
    width = max(1.0, (frame.x(1) - frame.x(0)) * 0.8)
    marks = []
    for step in steps:
        base = 0.0
        for number, (curve, column) in enumerate(zip(series, values, strict=True)):
            value = column.get(step, 0.0)
            top, bottom = frame.y(base + value), frame.y(base)
            marks.append(
                f'<rect x="{frame.x(step) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{bottom - top:.1f}" class="s{number % COLOURS} bar">'
                f"<title>{escape(curve.name)}, step {step:g}: {value:.3g} s</title></rect>"
            )
            base += value
    return _svg(frame, marks)


@dataclass(frozen=True)
class _Frame:
    """From steps and values to places in the drawing."""

    x_range: Point
    y_range: Point
    percent: bool

    @classmethod
    def around(cls, points: Sequence[Point], percent: bool = False, highest: float | None = None) -> "_Frame":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(0.0, *ys), max(ys)
        top = high + 0.06 * (high - low) if highest is None else max(highest, high)
        right = max(xs) if max(xs) > min(xs) else min(xs) + 1
        return cls((min(xs), right), (low, top if top > low else low + 1.0), percent)

    def x(self, step: float) -> float:
        low, high = self.x_range
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def label(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.4g}"


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + number) * step, 12) for number in range(count + 1)]


def _svg(frame: _Frame, marks: Sequence[str]) -> str:
    lines = []
    for value in _ticks(*frame.y_range):
        y = frame.y(value)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="tick end">{frame.label(value)}</text>')
    for step in _ticks(*frame.x_range):
        if step == round(step):
            lines.append(f'<text x="{frame.x(step):.1f}" y="{HEIGHT - 12}" class="tick middle">{step:g}</text>')
    body = "".join([*lines, *marks])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" preserveAspectRatio="xMidYMid meet">{body}</svg>'


def _curve(curve: Series, colour: int, frame: _Frame) -> str:
    places = [(frame.x(step), frame.y(value), step, value) for step, value in curve.points]
    parts = []
    if not curve.markers and len(places) > 1:
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<path d="{path}" class="s{colour} curve{" dashed" if curve.dashed else ""}"/>')
    if not curve.dashed:
        radius = 4 if curve.markers else 2.2 if len(places) <= 60 else 1.2
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="s{colour} dot">'
            f"<title>{escape(curve.name)}, step {step:g}: {frame.label(value)}</title></circle>"
            for x, y, step, value in places
        ]
    return "".join(parts)
