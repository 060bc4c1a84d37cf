"""Series: lines of metrics.jsonl in, columns of numbers out, thinned to what a picture can show.

A file of a run may be cut short, edited or hostile: what is no finite number is left out, here
and nowhere else, so that nothing but numbers reaches a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Event = dict[str, Any]
NO_FIGURES = frozenset({
    "step", "epoch", "progress", "share", "total", "exact", "overflows", "eta_seconds", "rows",
    "rank_seconds",
})  # fmt: skip
"""Fields of a line that no picture shows as they are."""
Points = list[tuple[float, float]]
"""(optimizer step, value), by ascending steps."""


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


class Columns:
    """Numbers of a run's steps by field, read once; row ids and other lists are left out."""

    def __init__(self, lines: Iterable[Event]) -> None:
        self.points: dict[str, Points] = {}
        self.steps = 0
        self.total: int | None = None
        for line in lines:
            step = number(line.get("step")) if isinstance(line, dict) else None
            if step is None:
                continue
            self.steps += 1
            total = number(line.get("total"))
            self.total = None if total is None else int(total)
            for name, value in line.items():
                found = None if name in NO_FIGURES else number(value)
                if found is not None:
                    self.points.setdefault(name, []).append((step, found))
            for name, value in _of_ranks(line):
                self.points.setdefault(name, []).append((step, value))

    def __getitem__(self, name: str) -> Points:
        """Return a field's points; none where no line has it."""
        return self.points.get(name, [])

    def values(self, name: str) -> list[float]:
        """Return a field's values alone."""
        return [value for _, value in self[name]]

    def last(self, name: str) -> float | None:
        """Return a field's last value."""
        return self[name][-1][1] if self[name] else None


def _of_ranks(line: Event) -> list[tuple[str, float]]:
    seconds = line.get("rank_seconds")
    known = [number(one) for one in seconds] if isinstance(seconds, list) else []
    times = [one for one in known if one is not None]
    return [("slowest_rank", max(times)), ("fastest_rank", min(times))] if len(times) > 1 else []


def thin(points: Points, columns: int) -> Points:
    """Keep what a line of so many pixels can show: first, lowest, highest and last per pixel.

    Args:
        points: by ascending steps.
        columns: pixels of the picture's width, at least 1.

    Returns:
        At most 4 points a pixel, in order; each of them is one of `points`.
    """
    if len(points) <= 2 * columns:
        return points
    steps, values = np.array(points).T
    left, right = steps[0], steps[-1]
    places = ((steps - left) / max(right - left, 1e-12) * columns).astype(np.int64)
    ends = np.append(np.flatnonzero(np.diff(np.minimum(places, columns - 1))) + 1, len(points))
    kept: Points = []
    start = 0
    for end in ends.tolist():
        bucket = values[start:end]
        chosen = {start, end - 1, start + int(bucket.argmin()), start + int(bucket.argmax())}
        kept += [points[place] for place in sorted(chosen)]
        start = end
    return kept


def smooth(points: Points, window: int) -> Points:
    """Return the mean of each `window` points up to and including each; of fewer at the start."""
    steps, values = np.array(points).T
    sums = np.append(0.0, np.cumsum(values))
    counts = np.minimum(np.arange(1, len(points) + 1), window)
    means = (sums[1:] - sums[np.arange(1, len(points) + 1) - counts]) / counts
    return list(zip(steps.tolist(), means.tolist(), strict=True))


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers between two bounds, about as many as wanted."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    unit = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
    first = math.ceil(low / unit - 1e-9)
    last = math.floor(high / unit + 1e-9)
    return [count * unit for count in range(first, last + 1)]


def ticks_log(low: float, high: float) -> list[float]:
    """Return powers of ten between two bounds over 0, with 2 and 5 where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(found) < 3:
        found = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return found[:: -(-len(found) // 6) or 1]


def short(value: float) -> str:
    """Write a number of an axis in few characters: 1.5k, 2e-4, 0.25."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size and size < 1e-2:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """Keep at most `limit` items, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
