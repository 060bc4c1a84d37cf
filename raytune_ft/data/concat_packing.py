"""Concat-and-cut packs: rows laid end to end and cut every `max_length` tokens, as XTuner v0.1.9.

For `data.compat: xtuner-0.1.9` only. Lengths in, slices of rows out. Samples are cut across packs
and see each other; a short pack in the middle and a lost tail are the reference's as well. Its
shuffle before packing has no seed of its own (NumPy's global state decides), so the order of rows
is ours: seeded, per data set.

Shapes: n = rows of a data set, L = max_length, P = packs, K = pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raytune_ft.config.schema import DataSection
from raytune_ft.data.packing import Ints, Numbers, Plan, epoch_order

GROUP_ROWS = 1000
"""Rows that are joined at a time, the batch size of `datasets.Dataset.map`."""
_PACK_ORDER = 13
"""Keeps the order of packs independent of a recipe's other random choices."""


@dataclass(frozen=True)
class Pieces:
    """Packs as slices of rows.

    `pieces` int64 (K, 3): row, first token, token behind the last; `ends` int64 (P + 1,): pack p
    is `pieces[ends[p] : ends[p + 1]]`.
    """

    pieces: Numbers
    ends: Numbers

    def pack(self, number: int) -> Numbers:
        """Return a pack's pieces, int64 (pieces, 3)."""
        return self.pieces[self.ends[number] : self.ends[number + 1]]


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


class ConcatPlan(Plan):
    """Which slices of which rows stand in which pack; the packs of all epochs are the same.

    Each data set is shuffled and packed on its own, once; an epoch visits the packs of all of
    them in a seeded order. A window is a run of packs in that order, of about `data.window` rows.

    Args:
        lengths: int32 (n_rows,), tokens after the cut; 0 for a row that is left out.
        data: the recipe's section.
        seed: decides the order.
        sets: int (n_rows,), the number of each row's data set.
    """

    isolated = False

    def __init__(self, lengths: Ints, data: DataSection, seed: int, sets: Ints) -> None:
        super().__init__(lengths, data, seed)
        self._sets = sets
        n_packs = len(self._packs.ends) - 1
        n_rows = max(1, len(self._used))
        self._window_packs = max(1, data.window * n_packs // n_rows)
        self.n_windows = -(-n_packs // self._window_packs)
        self._pack_order: tuple[int, Numbers] | None = None

    @property
    def lost_tokens(self) -> int:
        sizes = self._packs.pieces[:, 2] - self._packs.pieces[:, 1]
        return int(self.lengths.sum(dtype=np.int64) - sizes.sum())

    def window_pieces(self, epoch: int, window: int) -> list[Numbers]:
        chosen = self._order_of(epoch)[window * self._window_packs :][: self._window_packs]
        return [self._packs.pack(number) for number in chosen.tolist()]

    def window_groups(self, epoch: int, window: int) -> list[Numbers]:
        return [pieces[:, 0] for pieces in self.window_pieces(epoch, window)]

    def packs_per_window(self, epoch: int) -> list[int]:
        left = len(self._packs.ends) - 1
        size = self._window_packs
        return [min(size, left - window * size) for window in range(self.n_windows)]

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
            rows = rows[epoch_order(len(rows), self.seed, number, shuffle)]
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
            random = np.random.default_rng((self.seed, epoch, _PACK_ORDER))
            self._pack_order = (epoch, random.permutation(len(self._packs.ends) - 1))
        return self._pack_order[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what can be computed again."""
        kept = {key: value for key, value in super().__getstate__().items() if key != "_packs"}
        return {**kept, "_pack_order": None}


def _last_rows(n_rows: int, group_rows: int) -> Numbers:
    """Return the last row of each group, int64."""
    ends = np.arange(group_rows, n_rows + group_rows, group_rows, dtype=np.int64)
    return np.minimum(ends, n_rows) - 1
