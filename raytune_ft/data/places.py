"""Places: windows in, packs with their places in the stream out, one canonical order.

Each pack knows where the stream goes on behind it (what a checkpoint keeps), how much of the rows
has been visited, and which windows' reports it is the first to tell of. No Ray: `data.stream`
makes the windows elsewhere and calls `placed` as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.report import Report, add_report, new_report, nothing_left
from raytune_ft.data.windows import Feed, Window
from raytune_ft.errors import DataError


@dataclass(frozen=True)
class Placed:
    """A pack in the stream."""

    pack: Pack
    behind: Position
    """Where the stream goes on after it."""
    progress: float
    """Epochs of rows visited when the stream is there; 1.0 is the end of the first."""
    report: Report
    """What became of the rows of windows that this pack is the first to tell of."""


_Held = tuple[Position, Pack, float, Report]


def iter_packs(
    feed: Feed, start: Position | None = None, *, epochs: int | None = None
) -> Iterator[Placed]:
    """Yield packs in the canonical order, one window after the other, in this process.

    Args:
        feed: makes the windows.
        start: the first pack to yield; None is the beginning.
        epochs: stop after this many, counted from epoch 0; None goes on for ever.
    """
    start = start or Position()
    made = (
        (epoch, number, feed.window(epoch, number))
        for epoch, number in window_numbers(feed.n_windows, start, epochs)
    )
    yield from placed(made, start, feed.n_windows)


def window_numbers(
    n_windows: int, start: Position, epochs: int | None
) -> Iterator[tuple[int, int]]:
    """Yield (epoch, window) from `start` on."""
    epoch, window = start.epoch, start.window
    if not n_windows:
        return
    while epochs is None or epoch < epochs:
        if window < n_windows:
            yield epoch, window
            window += 1
        else:
            epoch, window = epoch + 1, 0


def placed(
    made: Iterable[tuple[int, int, Window]], start: Position, n_windows: int
) -> Iterator[Placed]:
    """Turn windows in order into packs with their places, from `start` on.

    A pack waits for the next one: only then is it known whether an epoch ends behind it. A
    window's report comes with its first pack, that of a window without packs with the pack before
    it, so that a run that stops and goes on tells of every window once.

    Raises:
        DataError: no row of a whole epoch can be trained on.
    """
    held: _Held | None = None
    untold, empty = new_report(), 0
    for epoch, number, window in made:
        if held is not None and held[0].epoch < epoch:
            yield _placed(held, None)
            held = None
        first = Position(epoch, number, 0)
        if not window.packs:
            add_report(untold if held is None else held[3], window.report)
            empty += 1
            if empty == n_windows:
                raise DataError(nothing_left(untold))
            continue
        empty = 0
        ends = np.cumsum([len(pack.input_ids) for pack in window.packs])
        shares = window.first + (window.last - window.first) * (ends / ends[-1])
        for place, (pack, share) in enumerate(zip(window.packs, shares.tolist(), strict=True)):
            here = replace(first, pack=place)
            if here < start:
                continue
            if held is not None:
                yield _placed(held, here)
            report = new_report()
            if place == 0:
                add_report(report, window.report)
            add_report(report, untold)
            untold = new_report()
            held = (here, pack, epoch + share, report)
    if held is not None:
        yield _placed(held, None)


def _placed(held: _Held, after: Position | None) -> Placed:
    here, pack, progress, report = held
    if after is None:
        return Placed(pack, Position(here.epoch + 1, 0, 0), here.epoch + 1.0, report)
    return Placed(pack, after, progress, report)
