"""Windows: the packs of a run, made window by window from (epoch, window) alone, without Ray.

What a data task does (`data.stream` runs many of them), what `inspect` shows and what tests call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import Recipe
from raytune_ft.data.concat_packing import ConcatPlan
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.examples import Encoder, encode_rows, usable_rows
from raytune_ft.data.order import RowOrder
from raytune_ft.data.packing import (
    Numbers,
    Pack,
    Position,
    cut_example,
    divide_rows,
    join_examples,
    pack_pieces,
)
from raytune_ft.data.report import Report, add_report, new_report, nothing_left
from raytune_ft.data.sources import RowSource
from raytune_ft.errors import DataError

__all__ = ["Encoder", "Feed", "Measurement", "Placed", "Window", "iter_packs", "measure_rows"]

_PACKS = 12
"""Keeps the order of packs independent of a recipe's other random choices."""
COUNTED_WINDOWS = 2
"""Windows that are made before a run, to see the first rows and to estimate its steps."""


@dataclass(frozen=True)
class Window:
    """What one data task makes."""

    packs: list[Pack]
    report: Report
    first: float
    last: float
    """Where in the epoch the window begins and ends: 0 is the epoch's start, 1 its end."""


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


@dataclass(frozen=True)
class Measurement:
    """Rows counted, before any training.

    `lengths` int32 (n_rows,): tokens after the cut, 0 for a row that is left out; `targets` int32
    (n_rows,): labelled tokens; `sets` int32 (n_rows,): the number of the row's data set.
    """

    lengths: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    sets: npt.NDArray[np.int32]
    report: Report


@dataclass(frozen=True)
class Feed:
    """All windows of a run's rows; picklable, so that it travels to data tasks.

    `plan` is `data.compat`'s, whose packs reach over all rows; None otherwise.
    """

    source: RowSource
    encoder: Encoder
    seed: int
    order: RowOrder
    plan: ConcatPlan | None = None

    @property
    def n_windows(self) -> int:
        """Windows of every epoch."""
        return self.order.n_windows if self.plan is None else self.plan.n_windows

    def window(self, epoch: int, number: int) -> Window:
        """Make one window.

        Raises:
            DataError: the first row, in the order of the visit, that is unusable, if the recipe
                does not skip it; or a file is not as it was when the run began.
        """
        if self.plan is not None:
            return self._planned_window(self.plan, epoch, number)
        rows = self.order.window_rows(epoch, number)
        report = new_report(len(rows))
        encoded = encode_rows(self.source, self.encoder, rows)
        examples = usable_rows(self.source, self.encoder, rows, encoded, report)
        packs = self._packed(rows, examples, report, epoch, number)
        start = number * self.order.window
        n_rows = self.order.n_rows
        return Window(packs, report, start / n_rows, (start + len(rows)) / n_rows)

    def _packed(
        self,
        rows: Numbers,
        examples: Sequence[Example | None],
        report: Report,
        epoch: int,
        number: int,
    ) -> list[Pack]:
        data = self.encoder.data
        lengths = [0 if example is None else len(example.input_ids) for example in examples]
        pieces = divide_rows(lengths, data)
        learned = np.array([_targets(examples, piece) > 0 for piece in pieces.tolist()], dtype=bool)
        if data.packing != "concat" and not learned.all():  # stretches without an answer
            report["tokens"] -= int((pieces[~learned, 2] - pieces[~learned, 1]).sum())
            pieces = pieces[learned]
        random = np.random.default_rng((self.seed, epoch, number, _PACKS))
        packs = [
            join_examples(
                [_part(examples[row], start, stop) for row, start, stop in part.tolist()],
                rows[part[:, 0]],
            )
            for part in pack_pieces(pieces, data, random)
        ]
        return [pack for pack in packs if pack.n_targets]

    def _planned_window(self, plan: ConcatPlan, epoch: int, number: int) -> Window:
        pieces = plan.window_pieces(epoch, number)
        rows = np.unique(np.concatenate(pieces)[:, 0])
        encoded = encode_rows(self.source, self.encoder, rows)
        examples = {
            row: _planned(example, self.source.where(row), int(plan.lengths[row]))
            for row, example in zip(rows.tolist(), encoded, strict=True)
        }
        packs = [
            join_examples(
                [_part(examples[row], start, stop) for row, start, stop in part.tolist()],
                part[:, 0],
                isolated=False,
            )
            for part in pieces
        ]
        start = number * plan.window_packs
        last = (start + len(packs)) / plan.n_packs
        return Window(packs, new_report(), start / plan.n_packs, last)


def make_feed(
    source: RowSource, encoder: Encoder, seed: int, measured: Measurement | None = None
) -> Feed:
    """Bind rows to the recipe's order and packing.

    Args:
        source: rows.
        encoder: makes examples of rows.
        seed: decides the order.
        measured: the sizes of all rows, which the packs of `data.compat` are computed from.
    """
    data = encoder.data
    order = RowOrder(
        source.chunk_ends(),
        seed,
        window=data.window,
        shuffle_rows=data.shuffle_rows,
        shuffle=data.shuffle_before_pack,
    )
    if data.compat is None:
        return Feed(source, encoder, seed, order)
    if measured is None:
        raise ValueError("data.compat packs rows by the sizes of all of them: measure them first")
    return Feed(
        source, encoder, seed, order, ConcatPlan(measured.lengths, data, seed, measured.sets)
    )


def measure_rows(source: RowSource, encoder: Encoder, rows: Sequence[int] | Numbers) -> Measurement:
    """Encode rows and keep only their sizes.

    Raises:
        DataError: as `examples.usable_rows`.
    """
    report = new_report(len(rows))
    encoded = encode_rows(source, encoder, rows)
    examples = usable_rows(source, encoder, rows, encoded, report)
    lengths = [0 if example is None else len(example.input_ids) for example in examples]
    targets = [0 if example is None else example.n_targets for example in examples]
    return Measurement(
        np.array(lengths, np.int32), np.array(targets, np.int32), source.sets_of(rows), report
    )


@dataclass(frozen=True)
class Estimate:
    """What the first windows of a run tell of the whole."""

    windows: list[Window]
    """The first windows of epoch 0."""
    report: Report
    """Of the rows of these windows."""
    packs: int
    """Packs of an epoch."""
    density: float
    """Tokens over the room in the packs, 0 to 1."""
    exact: bool
    """Whether these are all windows of the epoch."""

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of a run: a step never crosses an epoch's end."""
        steps = recipe.train.epochs * -(-self.packs // recipe.global_batch_size)
        return min(steps, recipe.train.max_steps or steps)


def estimate(feed: Feed) -> Estimate:
    """Make the first windows of a run and conclude from them to all of an epoch.

    Raises:
        DataError: as `Feed.window`.
    """
    windows = [feed.window(0, number) for number in range(min(COUNTED_WINDOWS, feed.n_windows))]
    report = new_report()
    for window in windows:
        add_report(report, window.report)
    packs = [pack for window in windows for pack in window.packs]
    share = windows[-1].last if windows else 1.0
    room = len(packs) * feed.encoder.data.max_length
    density = sum(len(pack.input_ids) for pack in packs) / room if room else 0.0
    exact = len(windows) == feed.n_windows
    if feed.plan is not None:
        return Estimate(windows, report, feed.plan.n_packs, density, True)
    return Estimate(windows, report, round(len(packs) / share), density, exact)


def count_packs(feed: Feed, measured: Measurement, epoch: int) -> int:
    """Count an epoch's packs exactly, from the sizes of all rows.

    A stretch of a split row that holds no answer is counted, though it makes no pack.
    """
    if feed.plan is not None:
        return feed.plan.n_packs
    total = 0
    for number in range(feed.n_windows):
        lengths = measured.lengths[feed.order.window_rows(epoch, number)]
        pieces = divide_rows(lengths, feed.encoder.data)
        total += len(pack_pieces(pieces, feed.encoder.data, np.random.default_rng(0)))
    return total


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


def _part(example: Example | None, start: int, stop: int) -> Example:
    if example is None:
        raise ValueError("a row that is left out stands in a pack")
    return cut_example(example, start, stop)


def _targets(examples: Sequence[Example | None], piece: tuple[int, int, int]) -> int:
    """Count the tokens of a piece that are learned; its first one has nothing before it."""
    row, start, stop = piece
    example = examples[row]
    if example is None:
        return 0
    return int((example.labels[start + 1 : stop] != IGNORE_INDEX).sum())


def _planned(example: Example | DataError | None, where: str, length: int) -> Example:
    if not isinstance(example, Example) or len(example.input_ids) != length:
        raise DataError(f"{where}: changed since the rows were counted; start the run again")
    return example
