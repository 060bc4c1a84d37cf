"""Order: which rows an epoch visits, in which order, and which of them make a window.

A function of (number of rows, chunks, seed, epoch) alone, so that any window can be made again
from its number. Up to `shuffle_rows` rows are shuffled as a whole. Of more, chunks (rows that lie
together in a file, long ones divided) are shuffled, then the rows of each pool of chunks: fewer
than 2 * `shuffle_rows` of them. So a window reads from the places of one or two pools, and takes
the same time and memory, however many rows there are.

Shapes: n = rows of an epoch, C = chunks, w = rows of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Key = TypeVar("Key")
Kept = TypeVar("Kept")

_CHUNKS, _ROWS = 10, 11
"""Keep the random choices of one recipe independent of each other."""


@dataclass(frozen=True)
class _Epoch:
    """Chunks in the order of the visit.

    `chunks` int64 (C,): the chunk of each turn; `turns` int64 (C,): the turn of each chunk;
    `firsts` int64 (C + 1,): rows of the epoch before each turn; `bounds` int64 (pools + 1,): pool
    p has the turns from `bounds[p]` to `bounds[p + 1]`.
    """

    chunks: Numbers
    turns: Numbers
    firsts: Numbers
    bounds: Numbers

    def rows_before(self, pool: int) -> int:
        """Rows of the epoch before a pool; behind the last one, all of them."""
        return int(self.firsts[self.bounds[pool]])


class RowOrder:
    """The order of every epoch.

    Args:
        chunk_ends: int64 (C,), ascending; chunk c ends before row `chunk_ends[c]`.
        seed: decides the order; 0 or more.
        window: rows per window, at least 1.
        shuffle_rows: rows shuffled together, at least 1; a pool begins about every so many rows.
        shuffle: if not, rows are visited by number, in every epoch.
    """

    def __init__(
        self, chunk_ends: Numbers, seed: int, *, window: int, shuffle_rows: int, shuffle: bool
    ) -> None:
        self.n_rows = int(chunk_ends[-1]) if len(chunk_ends) else 0
        self.n_windows = -(-self.n_rows // window)
        self.window = window
        self._chunk_ends = _divided(chunk_ends, shuffle_rows)
        self._seed, self._shuffle_rows, self._shuffle = seed, shuffle_rows, shuffle
        self._epochs: dict[int, _Epoch] = {}
        self._pools: dict[tuple[int, int], Numbers] = {}

    def window_rows(self, epoch: int, window: int) -> Numbers:
        """Return the rows of a window, int64 (w,), in the order of the visit."""
        start = window * self.window
        stop = min(start + self.window, self.n_rows)
        if not self._shuffle:
            return np.arange(start, stop, dtype=np.int64)
        order = self._epoch(epoch)
        pool = int(np.searchsorted(order.firsts[order.bounds], start, side="right")) - 1
        parts = []
        while pool < len(order.bounds) - 1 and (first := order.rows_before(pool)) < stop:
            parts.append(self._pool(epoch, pool)[max(0, start - first) : stop - first])
            pool += 1
        return np.concatenate(parts)

    def places(self, epoch: int, rows: Numbers) -> Numbers:
        """Return when an epoch visits each row, int64 of the same shape; 0 is its first visit."""
        if not self._shuffle:
            return np.asarray(rows, dtype=np.int64)
        order = self._epoch(epoch)
        chunks = np.searchsorted(self._chunk_ends, rows, side="right")
        turns = order.turns[chunks]
        unshuffled = order.firsts[turns] + rows - (self._chunk_ends - self._sizes)[chunks]
        pools = np.searchsorted(order.bounds, turns, side="right") - 1
        places = np.empty(len(rows), dtype=np.int64)
        for pool in np.unique(pools).tolist():
            first, mine = order.rows_before(pool), pools == pool
            shuffled = self._shuffled(epoch, pool)
            when = np.empty_like(shuffled)
            when[shuffled] = np.arange(len(shuffled))
            places[mine] = first + when[unshuffled[mine] - first]
        return places

    @cached_property
    def _sizes(self) -> Numbers:
        return np.diff(self._chunk_ends, prepend=0)

    def _epoch(self, epoch: int) -> _Epoch:
        """Return the chunks' order in an epoch; those of the two asked for last are kept."""
        if epoch not in self._epochs:
            random = np.random.default_rng((self._seed, epoch, _CHUNKS))
            chunks = random.permutation(len(self._chunk_ends))
            turns = np.empty_like(chunks)
            turns[chunks] = np.arange(len(chunks))
            firsts = np.append(0, np.cumsum(self._sizes[chunks]))
            # a chunk belongs to the pool in which it begins
            pools = firsts[:-1] // self._shuffle_rows
            if self.n_rows <= self._shuffle_rows:
                pools[:] = 0
            bounds = np.append(np.flatnonzero(np.diff(pools, prepend=-1)), len(chunks))
            self._epochs[epoch] = _Epoch(chunks, turns, firsts, bounds)
        return _recent(self._epochs, epoch)

    def _pool(self, epoch: int, pool: int) -> Numbers:
        """Return a pool's rows in the order of the visit; those of two pools are kept."""
        key = (epoch, pool)
        if key not in self._pools:
            order = self._epoch(epoch)
            chunks = order.chunks[order.bounds[pool] : order.bounds[pool + 1]]
            sizes = self._sizes[chunks]
            rows = np.arange(sizes.sum(), dtype=np.int64)
            rows += np.repeat(self._chunk_ends[chunks] - np.cumsum(sizes), sizes)
            self._pools[key] = rows[self._shuffled(epoch, pool)]
        return _recent(self._pools, key)

    def _shuffled(self, epoch: int, pool: int) -> Numbers:
        """Return the order in which a pool's rows are visited, int64 (rows,), from 0 on."""
        order = self._epoch(epoch)
        random = np.random.default_rng((self._seed, epoch, pool, _ROWS))
        return random.permutation(order.rows_before(pool + 1) - order.rows_before(pool))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what can be computed again."""
        kept = {key: value for key, value in self.__dict__.items() if key != "_sizes"}
        return {**kept, "_epochs": {}, "_pools": {}}


def _divided(chunk_ends: Numbers, most: int) -> Numbers:
    """Divide chunks of more than `most` rows evenly, so that a pool is never much larger."""
    sizes = np.diff(chunk_ends, prepend=0)
    parts = -(-sizes // most)
    chunk = np.repeat(np.arange(len(sizes)), parts)
    part = np.arange(len(chunk)) - np.repeat(np.cumsum(parts) - parts, parts) + 1
    ends: Numbers = (chunk_ends - sizes)[chunk] + sizes[chunk] * part // parts[chunk]
    return ends


def _recent(kept: dict[Key, Kept], key: Key) -> Kept:
    """Return what is kept under a key, and forget all but it and what was asked for before it."""
    found = kept.pop(key)
    for old in list(kept)[:-1]:
        del kept[old]
    kept[key] = found
    return found
