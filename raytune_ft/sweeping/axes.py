"""Axes: a sweep's space and its trials in, an axis for each field and the metric out.

A range has a scale, logarithmic where the space's is; choices stand side by side. Positions go
from 0 to 1; of the metric the good end is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.config.schema import TuneSection
from raytune_ft.sweeping.trials import Trial
from raytune_ft.sweeping.words import short_field, short_value
from raytune_ft.training.watching.reporting.series import number, short, ticks, ticks_log
from raytune_ft.training.watching.reporting.svg import LOG_RATIO

MOST_CHOICES = 12
"""Different values from which numbers have a scale, though the space lists them."""
MARKS = 12

Positions = dict[int, float]
"""Trial's number -> 0 to 1; a trial without a value is left out."""


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates."""

    title: str
    note: str
    """Under the title: its scale, or what it is tied to."""
    marks: list[tuple[float, str]]
    positions: Positions
    is_metric: bool = False
    grouped: dict[int, float] = field(default_factory=dict)
    """Of choices, how far a trial's line stands beside the choice's mark."""

    def at(self, number_: int) -> float | None:
        """Return where a trial's line crosses it."""
        place = self.positions.get(number_)
        return None if place is None else place + self.grouped.get(number_, 0.0)


def axes_of(section: TuneSection, trials: Sequence[Trial]) -> list[Axis]:
    """Return an axis for each field of the trials' values, and one for the metric, the last."""
    fields = list(dict.fromkeys(name for one in trials for name in one.values))
    found = []
    for name in fields:
        values = {one.number: one.values[name] for one in trials if name in one.values}
        choice = section.space.get(name)
        tie = f"= {choice}" if isinstance(choice, str) else ""
        source = _source(section, name)
        is_log = isinstance(source, dict) and bool(source.get("log"))
        title = short_field(name, fields)
        if isinstance(source, dict) or len({_key(v) for v in values.values()}) > MOST_CHOICES:
            ends = choice if isinstance(choice, dict) else {}
            scaled = _scaled(title, tie, values, ends, is_log=is_log)
            found.append(scaled or _choices(title, tie, values, source))
        else:
            found.append(_choices(title, tie, values, source))
    return [*found, _metric(section, trials)]


def _source(section: TuneSection, name: str) -> Any:
    """Return the choice that a field, or what it is tied to at last, is drawn from."""
    choice, seen = section.space.get(name), {name}
    while isinstance(choice, str):
        other = choice.rpartition("*")[2].strip()
        if other in seen:
            return None
        seen.add(other)
        choice = section.space.get(other)
    return choice


def _key(value: Any) -> Hashable:
    known = number(value)
    return known if known is not None else repr(value)


def _scaled(
    title: str,
    note: str,
    values: Mapping[int, Any],
    ends: Mapping[str, float],
    *,
    is_log: bool,
    turned: bool = False,
) -> Axis | None:
    """Return an axis with a scale from `low` to `high` of `ends`; None if no value is a number."""
    numbers = {n: known for n, v in values.items() if (known := number(v)) is not None}
    if is_log and any(one <= 0 for one in numbers.values()):
        is_log = False
    if not numbers:
        return None
    low = min([*numbers.values(), ends.get("low", math.inf)])
    high = max([*numbers.values(), ends.get("high", -math.inf)])
    place = _placing(low, high, is_log=is_log, turned=turned)
    marks = ticks_log(low, high) if is_log and low < high else ticks(low, high)
    note = ", ".join(one for one in (note, "log" if is_log else "") if one)
    return Axis(
        title,
        note,
        [(place(mark), short(mark)) for mark in marks],
        {n: place(value) for n, value in numbers.items()},
    )


def _placing(low: float, high: float, *, is_log: bool, turned: bool) -> Callable[[float], float]:
    def turn(value: float) -> float:
        return math.log(value) if is_log else value

    span = turn(high) - turn(low)

    def place(value: float) -> float:
        share = (turn(value) - turn(low)) / span if span > 0 else 0.5
        return 1 - share if turned else share

    return place


def _choices(title: str, note: str, values: dict[int, Any], source: Any) -> Axis:
    """Return an axis of choices: numbers by their size, others in the space's order."""
    listed = source if isinstance(source, list) else []
    keys = list(dict.fromkeys(map(_key, [*listed, *values.values()])))
    used = {_key(value) for value in values.values()}
    keys = [key for key in keys if key in used]
    if all(isinstance(key, float) for key in keys):
        keys.sort(key=lambda key: (isinstance(key, float), key))
    places = {key: (i + 0.5) / len(keys) for i, key in enumerate(keys)}
    names = {_key(value): short_value(value) for value in values.values()}
    shown = keys[:: -(-len(keys) // MARKS) or 1]
    spread = 0.35 / max(1, len(keys))
    beside = {}
    for key in keys:
        same = [n for n, value in values.items() if _key(value) == key]
        for i, n in enumerate(same):
            beside[n] = spread * ((i + 0.5) / len(same) - 0.5)
    return Axis(
        title,
        note,
        [(places[key], names[key]) for key in shown],
        {n: places[_key(value)] for n, value in values.items()},
        grouped=beside,
    )


def _metric(section: TuneSection, trials: Sequence[Trial]) -> Axis:
    values = {one.number: number(one.metric) for one in trials}
    known = {n: value for n, value in values.items() if value is not None}
    low, high = min(known.values(), default=1.0), max(known.values(), default=1.0)
    is_log = low > 0 and high / low > LOG_RATIO
    lower = section.mode == "min"
    found = _scaled(
        section.metric, "lower is better" if lower else "higher is better", known, {},
        is_log=is_log, turned=lower,
    )  # fmt: skip
    empty = found or Axis(section.metric, "", [], {})
    return Axis(empty.title, empty.note, empty.marks, empty.positions, is_metric=True)
