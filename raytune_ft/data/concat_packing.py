"""Concat-and-cut packs: rows laid end to end and cut every `max_length` tokens, as XTuner v0.1.9.

For `data.compat: xtuner-0.1.9` only. Lengths in, slices of rows out. Samples are cut across packs
and see each other; a short pack in the middle and a lost tail are the reference's as well. Its
shuffle before packing has no seed of its own (NumPy's global state decides), so the order of rows
is ours: seeded, per data set.

Shapes: n = rows of a data set, L = max_length, P = packs, K = pieces.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from raytune_ft.config.schema import DataSection
from raytune_ft.data.packing import Ints, Numbers, Pieces

GROUP_ROWS = 1000
"""Rows that are joined at a time, the batch size of `datasets.Dataset.map`."""
_ROWS, _PACKS = 14, 13
"""Keep the random choices of one recipe independent of each other."""


def pack_bounds(lengths: Numbers, max_length: int, group_rows: int) -> Numbers:
    """Return where packs begin and end in the rows laid end to end, int64 (P + 1,) from 0 on.

    Rows are joined in groups, with what the group before left over. At least `max_length` tokens
    are cut into full packs and the rest is carried on; fewer become one short pack. What the last
    group leaves over is lost.
    """
    bounds = [np.zeros(1, dtype=np.int64)]
    done = 0
    for group_end in np.cumsum(lengths)[_last_rows(len(lengths), group_rows)].tolist():
        full = (group_end - done) // max_length
        steps = max_length * np.arange(1, full + 1) if full else np.array([group_end - done])
        bounds.append(done + steps)
        done = int(bounds[-1][-1])
    return np.concatenate(bounds)


def cut_rows(lengths: Numbers, bounds: Numbers) -> Pieces:
    """Cut rows of at least one token each, laid end to end, at the bounds of packs."""
    row_ends = np.cumsum(lengths)
    row_starts = row_ends - lengths
    cuts = np.union1d(row_starts[row_starts < bounds[-1]], bounds)
    first, last = cuts[:-1], cuts[1:]
    rows = np.searchsorted(row_ends, first, side="right")
    pieces = np.stack([rows, first - row_starts[rows], last - row_starts[rows]], axis=1)
    return Pieces(pieces.astype(np.int64), np.searchsorted(first, bounds))


class ConcatPlan:
    """Which slices of which rows stand in which pack; the packs of all epochs are the same.

    Each data set is shuffled and packed on its own, once; an epoch visits the packs of all of
    them in a seeded order. A window is a run of packs in that order, of about `data.window` rows.

    Args:
        lengths: int32 (n_rows,), tokens after the cut; 0 for a row that is left out.
        data: the recipe's section.
        seed: decides the order.
        sets: int (n_rows,), the number of each row's data set.
    """

    def __init__(self, lengths: Ints, data: DataSection, seed: int, sets: Ints) -> None:
        self.lengths = lengths
        self.seed = seed
        self.max_length = data.max_length
        self._data = data
        self._used = np.flatnonzero(lengths > 0)
        self._sets = sets
        self.n_packs = len(self._packs)
        n_rows = max(1, len(self._used))
        self.window_packs = max(1, data.window * self.n_packs // n_rows)
        self.n_windows = -(-self.n_packs // self.window_packs)
        self._pack_order: tuple[int, Numbers] | None = None

    @property
    def lost_tokens(self) -> int:
        """Tokens of used rows that stand in no pack."""
        return int(self.lengths.sum(dtype=np.int64) - self._packs.sizes.sum())

    def window_pieces(self, epoch: int, window: int) -> Pieces:
        """Return the packs of a window in their final order, as slices of rows."""
        chosen = self._order_of(epoch)[window * self.window_packs :][: self.window_packs]
        return self._packs.take(chosen)

    @cached_property
    def _packs(self) -> Pieces:
        """The packs of all data sets, one data set after the other."""
        parts, ends = [np.zeros((0, 3), dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        for number in np.unique(self._sets[self._used]).tolist():
            rows = self._used[self._sets[self._used] == number]
            packed = self._packed(rows, number)
            ends.append(packed.ends[1:] + sum(len(part) for part in parts))
            parts.append(packed.pieces)
        return Pieces(np.concatenate(parts), np.concatenate(ends))

    def _packed(self, rows: Numbers, number: int) -> Pieces:
        """Pack one data set; without `pack` each row is a pack."""
        if self._data.pack:
            shuffle = self._data.shuffle_before_pack
            rows = rows[_order(len(rows), (self.seed, number, _ROWS), shuffle)]
        lengths = self.lengths[rows].astype(np.int64)
        bounds = (
            pack_bounds(lengths, self.max_length, GROUP_ROWS)
            if self._data.pack
            else np.concatenate([[0], np.cumsum(lengths)])
        )
        packed = cut_rows(lengths, bounds)
        packed.pieces[:, 0] = rows[packed.pieces[:, 0]]
        return packed

    def _order_of(self, epoch: int) -> Numbers:
        if self._pack_order is None or self._pack_order[0] != epoch:
            self._pack_order = (epoch, _order(self.n_packs, (self.seed, epoch, _PACKS)))
        return self._pack_order[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what can be computed again."""
        kept = {key: value for key, value in self.__dict__.items() if key != "_packs"}
        return {**kept, "_pack_order": None}


def _last_rows(n_rows: int, group_rows: int) -> Numbers:
    """Return the last row of each group, int64."""
    ends = np.arange(group_rows, n_rows + group_rows, group_rows, dtype=np.int64)
    return np.minimum(ends, n_rows) - 1


def _order(size: int, seed: tuple[int, ...], shuffle: bool = True) -> Numbers:
    return np.random.default_rng(seed).permutation(size) if shuffle else np.arange(size)
