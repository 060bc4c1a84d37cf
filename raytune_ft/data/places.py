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

    A pack waits for the next one: only then is it known what stands behind it. A window's report
    comes with its first pack, that of a window without packs with the pack before it (with the
    next one at an epoch's start), so that a run that stops and goes on tells of every window once.

    Args:
        made: (epoch, number, window) without a gap, from `start`'s window to an epoch's end.
        start: the first pack to yield.
        n_windows: windows of an epoch.

    Raises:
        DataError: no row of a whole epoch can be trained on.
    """
    if not n_windows:
        raise DataError(nothing_left(new_report()))
    held: _Held | None = None
    untold, seen = new_report(), 0
    for epoch, number, window in made:
        seen += 1
        if not window.packs:
            add_report(held.report if held else untold, window.report)
        for here, pack, share in _within(Position(epoch, number), window):
            if here < start:
                continue
            if held is not None:
                yield held.before(here)
            held = _Held(here, pack, epoch + share, untold)
            if here.pack == 0:
                add_report(held.report, window.report)
            untold = new_report()
        if number == n_windows - 1:
            if held is not None:
                yield held.at_the_end()
            elif seen == n_windows:
                raise DataError(nothing_left(untold))
            held, seen = None, 0


def _within(first: Position, window: Window) -> Iterator[tuple[Position, Pack, float]]:
    """Yield a window's packs with their places and the share of the epoch that ends with each."""
    tokens = np.cumsum([len(pack.input_ids) for pack in window.packs])
    for number, pack in enumerate(window.packs):
        share = window.first + (window.last - window.first) * float(tokens[number] / tokens[-1])
        yield replace(first, pack=number), pack, share


@dataclass(frozen=True)
class _Held:
    """A pack that waits for the next one."""

    here: Position
    pack: Pack
    progress: float
    report: Report

    def before(self, following: Position) -> Placed:
        return Placed(self.pack, following, self.progress, self.report)

    def at_the_end(self) -> Placed:
        epoch = self.here.epoch + 1
        return Placed(self.pack, Position(epoch), float(epoch), self.report)
