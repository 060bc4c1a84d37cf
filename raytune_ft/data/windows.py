"""Windows: the packs of a run, made window by window from (epoch, window) alone, without Ray.

What a data task does (`data.stream` runs many of them), what `inspect` shows and what tests call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_ft.data.cache.tokens import TokenCache, bind
from raytune_ft.data.concat_packing import ConcatPlan
from raytune_ft.data.encode import Example
from raytune_ft.data.examples import Encoder, encode_rows, usable_rows
from raytune_ft.data.order import RowOrder
from raytune_ft.data.packing import (
    Numbers,
    Pack,
    Pieces,
    WindowTokens,
    divide_rows,
    pack_pieces,
)
from raytune_ft.data.report import Report, forget, new_report
from raytune_ft.data.sources import RowSource
from raytune_ft.errors import DataError

__all__ = ["Encoder", "Feed", "Measurement", "Window", "make_feed", "measure_rows"]

_PACKS = 12
"""Keeps the order of packs independent of a recipe's other random choices."""


@dataclass(frozen=True)
class Window:
    """What one data task makes."""

    packs: list[Pack]
    report: Report
    first: float
    last: float
    """Where in the epoch the window begins and ends: 0 is the epoch's start, 1 its end."""


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

    `plan` is `data.compat`'s, whose packs reach over all rows; None otherwise. `cache` is
    `data.cache`'s.
    """

    source: RowSource
    encoder: Encoder
    seed: int
    order: RowOrder
    plan: ConcatPlan | None = None
    cache: TokenCache | None = None

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
        if self.cache is None:
            encoded = encode_rows(self.source, self.encoder, rows)
        else:
            encoded = self.cache.encode(epoch, number, rows)
        examples = usable_rows(self.source, self.encoder, rows, encoded, report)
        tokens = WindowTokens.of(examples)
        laid = self._laid(tokens, epoch, number)
        packs = tokens.packs(laid, rows)
        placed = np.unique(laid.pieces[:, 0])
        report["tokens"] = int(laid.sizes.sum())
        report["targets"] = sum(pack.n_targets for pack in packs)
        report["left_out"] = int(tokens.lengths[placed].sum()) - report["tokens"]
        for place in np.setdiff1d(np.flatnonzero(tokens.lengths), placed).tolist():
            split = bool(tokens.lengths[place] > self.encoder.data.max_length)
            forget(report, self.source.where(int(rows[place])), split=split)
        start = number * self.order.window
        n_rows = self.order.n_rows
        return Window(packs, report, start / n_rows, (start + len(rows)) / n_rows)

    def _laid(self, tokens: WindowTokens, epoch: int, number: int) -> Pieces:
        """Decide which stretches of rows stand in which pack, without those that teach nothing."""
        data = self.encoder.data
        pieces = divide_rows(tokens.lengths, data)
        if data.packing != "concat":
            pieces = pieces[tokens.targets(pieces) > 0]
        random = np.random.default_rng((self.seed, epoch, number, _PACKS))
        laid = pack_pieces(pieces, data, random)
        learned = np.append(0, np.cumsum(tokens.targets(laid.pieces)))[laid.ends]
        return laid.take(np.flatnonzero(np.diff(learned)))

    def _planned_window(self, plan: ConcatPlan, epoch: int, number: int) -> Window:
        laid = plan.window_pieces(epoch, number)
        rows = np.unique(laid.pieces[:, 0])
        encoded = encode_rows(self.source, self.encoder, rows)
        tokens = WindowTokens.of(
            [
                _planned(example, self.source.where(row), int(plan.lengths[row]))
                for row, example in zip(rows.tolist(), encoded, strict=True)
            ]
        )
        places = np.searchsorted(rows, laid.pieces[:, 0])
        here = Pieces(np.column_stack([places, laid.pieces[:, 1:]]), laid.ends)
        start = number * plan.window_packs
        last = (start + len(laid)) / plan.n_packs
        packs = tokens.packs(here, rows, isolated=False)
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
        return Feed(source, encoder, seed, order, cache=bind(source, encoder, seed, order))
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


def _planned(example: Example | DataError | None, where: str, length: int) -> Example:
    if not isinstance(example, Example) or len(example.input_ids) != length:
        raise DataError(f"{where}: changed since the rows were counted; start the run again")
    return example
