"""Line charts as inline SVG.

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


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
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
    points = [point for curve in series for point in curve.points]
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    top = high + 0.06 * (high - low) if highest is None else max(highest, high)
    frame = _Frame((min(steps), max(*steps, min(steps) + 1)), (low, top if top > low else low + 1.0), percent)
    marks = [_curve(curve, number % COLOURS, frame) for number, curve in enumerate(series)]
    body = "".join([*_grid(frame), *marks])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" preserveAspectRatio="xMidYMid meet">{body}</svg>'


@dataclass(frozen=True)
class _Frame:
    """From steps and values to places in the drawing."""

    steps: tuple[float, float]
    values: tuple[float, float]
    percent: bool

    def x(self, step: float) -> float:
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def label(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.4g}"


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _grid(frame: _Frame) -> list[str]:
    lines = []
    for value in _ticks(*frame.values):
        y = frame.y(value)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="tick end">{frame.label(value)}</text>')
    for step in _ticks(*frame.steps):
        if step == round(step):
            lines.append(f'<text x="{frame.x(step):.1f}" y="{HEIGHT - 12}" class="tick middle">{step:g}</text>')
    lines.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 12}" class="tick end">step</text>')
    return lines


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
