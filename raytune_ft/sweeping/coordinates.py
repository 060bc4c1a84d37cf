"""Coordinates: axes and trials in, the picture of parallel coordinates out, twice.

Upright for a screen, lying for a phone; both can be brushed by `page.js`, which reads `data-p`, a
trial's places on all axes, and `data-a`, an axis' number. Without the script they are pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from raytune_ft.sweeping.axes import Axis
from raytune_ft.sweeping.trials import Trial
from raytune_ft.training.watching.reporting.style import text

WIDE, TALL = 840, 330
TOP, BOTTOM, LEFT, RIGHT = 44, 14, 62, 64
NARROW, ROW = 360, 76
"""Pixels of a phone's width, and between two of its axes."""
SIDE = 22
HIT = 15
"""Pixels beside an axis in which it is grasped."""

Point = Callable[[int, float], tuple[float, float]]
"""An axis' number and a place on it -> x, y."""


def figure_of(axes: Sequence[Axis], trials: Sequence[Trial], looks: Mapping[int, str]) -> str:
    """Return both pictures.

    Args:
        axes: the last one is the metric's.
        trials: best first; drawn from the last to the first.
        looks: trial's number -> classes of its line.
    """
    return (
        f"<figure class='wide coordinates'><div class=broad>{_upright(axes, trials, looks)}</div>"
        f"<div class=narrow>{_lying(axes, trials, looks)}</div></figure>"
    )


def _upright(axes: Sequence[Axis], trials: Sequence[Trial], looks: Mapping[int, str]) -> str:
    gap = (WIDE - LEFT - RIGHT) / max(1, len(axes) - 1)
    floor, height = TALL - BOTTOM, TALL - BOTTOM - TOP

    def point(axis: int, place: float) -> tuple[float, float]:
        return LEFT + axis * gap, floor - place * height

    parts = [_threads(axes, trials, looks, point)]
    for i, axis in enumerate(axes):
        x, last = LEFT + i * gap, i == len(axes) - 1
        side, anchor = (x + 7, "start") if last else (x - 7, "end")
        parts.append(f'<path class=axis d="M{x:.1f} {TOP}V{floor}"/>')
        parts.append(_title(axis, x, 16, "middle"))
        for place, label in axis.marks:
            y = point(i, place)[1]
            parts.append(f'<path class=axis d="M{x - 3:.1f} {y:.1f}h6"/>')
            parts.append(_label(side, y + 3.5, anchor, label))
        parts.append(_grasp(i, x - HIT, TOP - 4, 2 * HIT, height + 8, "y"))
    return _svg(WIDE, TALL, parts)


def _lying(axes: Sequence[Axis], trials: Sequence[Trial], looks: Mapping[int, str]) -> str:
    width = NARROW - 2 * SIDE

    def point(axis: int, place: float) -> tuple[float, float]:
        return SIDE + place * width, 34 + axis * ROW

    parts = [_threads(axes, trials, looks, point)]
    for i, axis in enumerate(axes):
        y = 34 + i * ROW
        parts.append(f'<path class=axis d="M{SIDE} {y}H{NARROW - SIDE}"/>')
        parts.append(_title(axis, 2, y - 18, "start", beside=True))
        room = 0.0
        for place, label in sorted(axis.marks):
            x = point(i, place)[0]
            parts.append(f'<path class=axis d="M{x:.1f} {y - 3}v6"/>')
            if x - 3.2 * len(label) >= room:  # words that would lie on each other are left out
                room = x + 3.2 * len(label) + 6
                parts.append(_label(x, y + 16, "middle", label))
        parts.append(_grasp(i, SIDE - 4, y - HIT, width + 8, 2 * HIT, "x"))
    return _svg(NARROW, 34 + (len(axes) - 1) * ROW + 24, parts)


def _threads(
    axes: Sequence[Axis], trials: Sequence[Trial], looks: Mapping[int, str], point: Point
) -> str:
    drawn = []
    for trial in reversed(trials):
        places = [axis.at(trial.number) for axis in axes]
        met = [(i, place) for i, place in enumerate(places) if place is not None]
        if not met:
            continue
        corners = [point(i, place) for i, place in met]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
        data = " ".join("-" if place is None else f"{place:.3f}" for place in places)
        drawn.append(
            f'<path class="thread {looks[trial.number]}" data-n={trial.number} data-p="{data}" '
            f'd="M{path}"/>'
        )
    return "".join(drawn)


def _title(axis: Axis, x: float, y: float, anchor: str, *, beside: bool = False) -> str:
    where = "" if beside else f' x="{x:.1f}" dy=13'
    gap = " " if beside else ""
    note = f"<tspan class=unit{where}>{gap}{text(axis.note)}</tspan>" if axis.note else ""
    return (
        f'<text class=name x="{x:.1f}" y={y} text-anchor={anchor}>{text(axis.title)}{note}</text>'
    )


def _label(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text class=mark x="{x:.1f}" y="{y:.1f}" text-anchor={anchor}>{text(words)}</text>'


def _grasp(number: int, x: float, y: float, width: float, height: float, along: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return (
        f"<rect class=brush data-a={number} {place} visibility=hidden />"
        f"<rect class=grasp data-a={number} data-along={along} {place} />"
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class=chart viewBox="0 0 {width} {height:.0f}" role=img '
        f'aria-label="parallel coordinates">{"".join(parts)}</svg>'
    )
