"""Packing: which rows share a pack, in which order, from their lengths alone; and the packs.

Stage 4 of the data's way (encode -> **pack** -> batch). Pure NumPy: no torch, no ray.

The order of an epoch is a function of (lengths, recipe, seed, epoch): rows are visited in a seeded
permutation, `window` rows at a time are packed together, and a window's packs are shuffled. Any
window can be made again from its number.

Shapes: L = longest pack of a batch, n = tokens of one pack, S = segments in one pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection, Recipe
from raytune_ft.data.encode import IGNORE_INDEX, Example

__all__ = [
    "IGNORE_INDEX",
    "Pack",
    "Plan",
    "Position",
    "build_pack",
    "collate",
    "count_steps",
    "cut_example",
    "epoch_order",
    "join_examples",
    "pack_lengths",
]

SIMILAR_ROWS = 16
"""Unpacked rows of similar length that stay neighbours, so that batches need little padding."""
_ORDER, _PACKS = 11, 12
"""Keep the random choices of one recipe independent of each other."""

Ints = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Position:
    """The next pack to be consumed."""

    epoch: int = 0
    window: int = 0
    pack: int = 0


@dataclass(frozen=True)
class Pack:
    """Segments end to end; each is to see itself only.

    `input_ids`, `labels`, `position_ids` int32 (n,); `cu_seqlens` int32 (S + 1,), from 0 to n;
    `row_ids` int64, the numbers of the rows. A segment is a row, so there are S of them; only
    with `data.compat` a pack is one segment of many rows.
    """

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    cu_seqlens: Ints
    row_ids: Numbers

    @property
    def n_targets(self) -> int:
        """Number of labelled tokens."""
        return int((self.labels != IGNORE_INDEX).sum())


def pack_lengths(lengths: Sequence[int] | Numbers | Ints, max_length: int) -> list[list[int]]:
    """Group items into packs of at most `max_length`, best fit in order of decreasing length.

    Deterministic; O(n log n) for the sort and O(log max_length) per item.

    Args:
        lengths: each at least 1 and at most `max_length`.
        max_length: tokens per pack.

    Returns:
        Indices per pack, ascending within a pack.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= max_length:
        raise ValueError(f"lengths must lie in 1..{max_length}: {sizes.min()}..{sizes.max()}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with exactly this room
    rooms: list[int] = []  # the keys of open_packs, ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            number, room = len(packs), max_length
            packs.append([])
        else:
            room = rooms[place]
            number = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[place]
        packs[number].append(index)
        if room > size:
            if room - size not in open_packs:
                insort(rooms, room - size)
                open_packs[room - size] = []
            open_packs[room - size].append(number)
    return [sorted(pack) for pack in packs]


def epoch_order(n_rows: int, seed: int, epoch: int, shuffle: bool) -> Numbers:
    """Return the order in which an epoch visits rows, int64 of shape (n_rows,)."""
    if not shuffle:
        return np.arange(n_rows, dtype=np.int64)
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(n_rows)


class Plan:
    """Which rows stand in which pack of which window, for every epoch.

    Args:
        lengths: int32 (n_rows,), tokens after the cut; 0 for a row that is left out.
        data: the recipe's section.
        seed: decides the order.

    `n_windows` is the number of windows of every epoch; 0 when all rows are left out.
    """

    isolated = True
    """Whether each row is a segment of its own; if not, a pack is one segment."""

    def __init__(self, lengths: Ints, data: DataSection, seed: int) -> None:
        self.lengths = lengths
        self.seed = seed
        self.max_length = data.max_length
        self._data = data
        self._used = np.flatnonzero(lengths > 0)
        self.n_windows = -(-len(self._used) // data.window)
        self._order: tuple[int, Numbers] | None = None
        self._counts: dict[int, list[int]] = {}

    def window_rows(self, epoch: int, window: int) -> Numbers:
        """Return the rows of a window, int64, in the order of the visit."""
        if self._order is None or self._order[0] != epoch:
            shuffle = self._data.shuffle_before_pack
            order = epoch_order(len(self._used), self.seed, epoch, shuffle)
            self._order = (epoch, self._used[order])
        size = self._data.window
        return self._order[1][window * size : (window + 1) * size]

    def window_groups(self, epoch: int, window: int) -> list[Numbers]:
        """Return the rows of each pack of a window, int64 each, in the packs' final order."""
        rows = self.window_rows(epoch, window)
        random = np.random.default_rng((self.seed, epoch, window, _PACKS))
        if not self._data.pack:
            return [rows[place : place + 1] for place in self._similar(rows, random)]
        groups = pack_lengths(self.lengths[rows], self.max_length)
        return [rows[groups[place]] for place in random.permutation(len(groups))]

    def window_pieces(self, epoch: int, window: int) -> list[Numbers]:
        """Return the slices of rows of each pack of a window, in the packs' final order.

        Each is int64 (pieces, 3): row, first token, token behind the last. Here rows are whole.
        """
        return [
            np.stack([rows, np.zeros_like(rows), self.lengths[rows]], axis=1)
            for rows in self.window_groups(epoch, window)
        ]

    @property
    def lost_tokens(self) -> int:
        """Tokens of used rows that stand in no pack."""
        return 0

    def packs_per_window(self, epoch: int) -> list[int]:
        """Count the packs of each window of an epoch."""
        key = epoch if self._data.shuffle_before_pack else 0
        if key not in self._counts:
            self._counts[key] = [self._count(epoch, window) for window in range(self.n_windows)]
        return self._counts[key]

    def n_packs(self, epoch: int) -> int:
        """Count the packs of an epoch."""
        return sum(self.packs_per_window(epoch))

    def total_packs(self, epochs: int) -> int:
        """Count the packs of the first `epochs` epochs."""
        return sum(self.n_packs(epoch) for epoch in range(epochs))

    def after(self, epoch: int, window: int, pack: int, n_packs: int) -> Position:
        """Return the position behind a pack of a window that has `n_packs`."""
        if pack + 1 < n_packs:
            return Position(epoch, window, pack + 1)
        if window + 1 < self.n_windows:
            return Position(epoch, window + 1, 0)
        return Position(epoch + 1, 0, 0)

    def _count(self, epoch: int, window: int) -> int:
        rows = self.window_rows(epoch, window)
        if not self._data.pack:
            return len(rows)
        return len(pack_lengths(self.lengths[rows], self.max_length))

    def _similar(self, rows: Numbers, random: np.random.Generator) -> list[int]:
        """Order single rows: by length in groups, the groups shuffled."""
        by_length = np.argsort(self.lengths[rows], kind="stable")
        groups = [
            by_length[start : start + SIMILAR_ROWS]
            for start in range(0, len(by_length), SIMILAR_ROWS)
        ]
        return [int(row) for place in random.permutation(len(groups)) for row in groups[place]]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what can be computed again."""
        return {**self.__dict__, "_order": None, "_counts": {}}


def count_steps(plan: Plan, recipe: Recipe) -> int:
    """Count optimizer steps: a step never crosses an epoch's end, so each epoch rounds up."""
    per_step = recipe.global_batch_size
    steps = sum(-(-plan.n_packs(epoch) // per_step) for epoch in range(recipe.train.epochs))
    return min(steps, recipe.train.max_steps or steps)


def cut_example(example: Example, start: int, stop: int) -> Example:
    """Return a stretch of an example's tokens."""
    return replace(
        example, input_ids=example.input_ids[start:stop], labels=example.labels[start:stop]
    )


def join_examples(
    examples: Sequence[Example], row_ids: Sequence[int] | Numbers, *, isolated: bool = True
) -> Pack:
    """Lay examples end to end; each is a segment, or, if not `isolated`, all are one."""
    sizes = [len(example.input_ids) for example in examples]
    return build_pack(
        np.concatenate([example.input_ids for example in examples]),
        np.concatenate([example.labels for example in examples]),
        sizes if isolated else [sum(sizes)],
        row_ids,
    )


def build_pack(
    input_ids: Ints, labels: Ints, sizes: Sequence[int] | Ints, row_ids: Sequence[int] | Numbers
) -> Pack:
    """Make a pack of segments of `sizes` tokens; positions restart at each."""
    return Pack(
        input_ids=input_ids,
        labels=labels,
        position_ids=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        cu_seqlens=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        row_ids=np.asarray(row_ids, dtype=np.int64),
    )


def collate(packs: Sequence[Pack], pad_to: int | None = None) -> dict[str, Ints]:
    """Lay packs under each other, padded at the right.

    Args:
        packs: B of them.
        pad_to: L; None takes the longest pack.

    Returns:
        `input_ids`, `labels`, `position_ids`, `segment_ids`, int32 (B, L). Padding: id 0, label
        IGNORE_INDEX, position 0, segment -1. Attention is allowed within a segment of 0 or more.
    """
    width = max(len(pack.input_ids) for pack in packs) if pad_to is None else pad_to
    fills = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": -1}
    batch = {key: np.full((len(packs), width), fill, np.int32) for key, fill in fills.items()}
    for row, pack in enumerate(packs):
        size = len(pack.input_ids)
        batch["input_ids"][row, :size] = pack.input_ids
        batch["labels"][row, :size] = pack.labels
        batch["position_ids"][row, :size] = pack.position_ids
        segments = np.diff(pack.cu_seqlens)
        batch["segment_ids"][row, :size] = np.repeat(np.arange(len(segments)), segments)
    return batch
