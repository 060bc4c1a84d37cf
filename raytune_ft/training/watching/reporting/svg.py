"""SVG: series in, one picture of lines out, as text without scripts, links or fonts of its own.

Colours are the page's (`style.STYLE`), so that one picture fits light, dark and paper. Its units
are pixels of the width that it is shown at on a phone, so that its words stay readable there.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raytune_ft.training.watching.reporting.series import (
    Points,
    short,
    smooth,
    thin,
    ticks,
    ticks_log,
)

LEFT, RIGHT, TOP, BOTTOM = 44, 16, 26, 22
"""Room for words around the lines, in pixels."""
SMOOTHED = 50
"""Steps from which a noisy line is drawn faintly, with its running mean on top."""
LEAST_ROOM = 1e-290
"""Room around values that differ by less than a scale can divide by."""
LOG_RATIO = 50.0
"""Highest over lowest from which a chart that may be logarithmic is."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    points: Points
    color: int = 0
    """Number of a colour of the page, from 0."""
    noisy: bool = False
    """Whether its running mean says more than itself."""
    faint: bool = True
    """Whether a noisy line is drawn faintly behind its mean."""
    dots: bool = False
    """Whether each point is one measurement of its own, as a validation is."""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn together."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    keys: bool = True
    """Whether the lines are named; not where the page does it once for all charts."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Label -> attributes of an element around the line, written by the page itself."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.points for line in self.lines)


Scale = Callable[[float], float]


def draw(chart: Chart, width: int = 400, height: int = 220) -> str:
    """Return an `<svg>` element of at most a few tens of kilobytes; empty without points."""
    lines = [line for line in chart.lines if line.points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in (line.points[0], line.points[-1])]
    values = [value for line in lines for _, value in line.points]
    is_log = chart.may_be_log and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    low, high = _bounds(values, from_zero=chart.from_zero, is_log=is_log)
    first, last = _widened(min(steps), max(steps))
    x = _scale(first, last, LEFT, width - RIGHT)
    y = _scale(low, high, height - BOTTOM, TOP, is_log=is_log)
    marks = ticks_log(low, high) if is_log else ticks(low, high)
    parts = [_rows(marks, y, width), _columns(first, last, x, width, height)]
    for line in lines:
        drawn, group = _line(line, x, y, width), chart.groups.get(line.label)
        parts.append(f"<g {group}>{drawn}</g>" if group else drawn)
    parts.append(_legend(chart, lines))
    name = html.escape(chart.title)
    return (
        f'<svg class=chart viewBox="0 0 {width} {height}" role=img aria-label="{name}">'
        f"{''.join(parts)}</svg>"
    )


def _bounds(values: list[float], *, from_zero: bool, is_log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if is_log:
        return low / 1.1, high * 1.1
    if from_zero:
        low = min(0.0, low)
    room = max(LEAST_ROOM, 0.05 * (high - low) or 0.1 * abs(high) or 1.0)
    return low - (0.0 if from_zero and low == 0.0 else room), high + room


def _widened(first: float, last: float) -> tuple[float, float]:
    return (first - 1, last + 1) if first == last else (first, last)


def _scale(low: float, high: float, start: float, end: float, *, is_log: bool = False) -> Scale:
    def turn(value: float) -> float:
        return math.log10(value) if is_log else value

    factor = (end - start) / (turn(high) - turn(low))
    return lambda value: start + (turn(value) - turn(low)) * factor


def _rows(marks: Sequence[float], y: Scale, width: int) -> str:
    return "".join(
        f'<path class=grid d="M{LEFT} {y(mark):.1f}H{width - RIGHT}"/>'
        f"<text x={LEFT - 5} y={y(mark) + 3.5:.1f} text-anchor=end>{short(mark)}</text>"
        for mark in marks
    )


def _columns(first: float, last: float, x: Scale, width: int, height: int) -> str:
    marks = [mark for mark in ticks(first, last, width // 90) if mark == int(mark)]
    floor = height - BOTTOM
    words = "".join(
        f'<path class=grid d="M{x(mark):.1f} {floor}v4"/>'
        f"<text x={x(mark):.1f} y={height - 7} text-anchor=middle>{short(mark)}</text>"
        for mark in marks
    )
    return f'<path class=axis d="M{LEFT} {floor}H{width - RIGHT}"/>{words}'


def _line(line: Line, x: Scale, y: Scale, width: int) -> str:
    columns = width - LEFT - RIGHT
    style = f"c{line.color}" + (" dashed" if line.dashed else "")
    if line.dots:
        shown = thin(line.points, columns // 4)
        rounds = "".join(f"<circle cx={x(s):.1f} cy={y(v):.1f} r=2.6 />" for s, v in shown)
        return f'{_path(shown, x, y, style)}<g class="{style} dot">{rounds}</g>'
    if line.noisy and len(line.points) >= SMOOTHED:
        mean = smooth(line.points, max(5, len(line.points) // 40))
        behind = _path(thin(line.points, columns), x, y, f"{style} faint") if line.faint else ""
        return behind + _path(thin(mean, columns // 2), x, y, style)
    return _path(thin(line.points, columns), x, y, style)


def _path(points: Points, x: Scale, y: Scale, style: str) -> str:
    if len(points) == 1:
        (step, value), *_ = points
        return f'<g class="{style} dot"><circle cx={x(step):.1f} cy={y(value):.1f} r=2.6 /></g>'
    places = [f"{x(step):.1f} {y(value):.1f}" for step, value in points]
    return f'<path class="{style}" d="M{"L".join(places)}"/>'


def _legend(chart: Chart, lines: Sequence[Line]) -> str:
    unit = f" <tspan class=unit>{html.escape(chart.unit)}</tspan>" if chart.unit else ""
    title = f"<text class=name x=0 y=13>{html.escape(chart.title)}{unit}</text>"
    if len(lines) < 2 or not chart.keys:
        return title
    place, words = 7.6 * len(chart.title) + 7.0 * len(chart.unit) + 22, []
    for line in lines:
        label = html.escape(line.label)
        words.append(
            f'<path class="c{line.color} key{" dashed" if line.dashed else ""}" '
            f'd="M{place:.0f} 9h14"/><text x={place + 18:.0f} y=13>{label}</text>'
        )
        place += 32 + 6.2 * len(line.label)
    return title + "".join(words)
