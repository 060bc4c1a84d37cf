"""Packing: which rows of a window share a pack, from their lengths alone; and the packs.

Stage 4 of the data's way (encode -> **pack** -> batch). Pure NumPy: no torch, no ray. `order`
decides which rows make a window.

Shapes: L = longest pack of a batch, n = tokens of one pack, S = segments in one pack.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX, Example

__all__ = [
    "IGNORE_INDEX",
    "Pack",
    "Position",
    "build_pack",
    "collate",
    "cut_example",
    "divide_rows",
    "join_examples",
    "pack_lengths",
    "pack_pieces",
]

SIMILAR_ROWS = 16
"""Unpacked rows of similar length that stay neighbours, so that batches need little padding."""
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
    `row_ids` int64 (S,), the number of each segment's row. A segment is a row or a stretch of
    one; only with `data.compat` a pack is one segment of many rows.
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


def divide_rows(lengths: Sequence[int] | Numbers | Ints, data: DataSection) -> Numbers:
    """Divide rows into stretches of at most `max_length`; `concat` takes them whole.

    Args:
        lengths: tokens of each row, in the order of the visit; 0 for a row that is left out.
        data: `packing` and `max_length` are read.

    Returns:
        int64 (pieces, 3): row (index into `lengths`), first token, token behind the last.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limit = data.max_length if data.packing != "concat" else max(1, int(sizes.max(initial=1)))
    counts = -(-sizes // limit)
    rows = np.repeat(np.arange(len(sizes)), counts)
    firsts = np.cumsum(counts) - counts
    starts = (np.arange(len(rows)) - firsts[rows]) * limit
    return np.stack([rows, starts, np.minimum(starts + limit, sizes[rows])], axis=1)


def pack_pieces(pieces: Numbers, data: DataSection, random: np.random.Generator) -> list[Numbers]:
    """Decide which pieces share a pack.

    Args:
        pieces: int64 (pieces, 3), as `divide_rows` gives them.
        data: `packing` and `max_length` are read.
        random: decides the order of the packs.

    Returns:
        The packs in their final order, each int64 (pieces, 3).
    """
    if data.packing == "concat":
        packs = _concat(pieces, data.max_length)
        return [packs[place] for place in random.permutation(len(packs))]
    sizes = pieces[:, 2] - pieces[:, 1]
    if data.packing == "none":
        return [pieces[place : place + 1] for place in _similar(sizes, random)]
    groups = pack_lengths(sizes, data.max_length)
    return [pieces[groups[place]] for place in random.permutation(len(groups))]


def _concat(pieces: Numbers, max_length: int) -> list[Numbers]:
    """Lay pieces end to end and cut every `max_length` tokens; the last pack may be short."""
    ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.append(np.arange(0, total, max_length), total)
    cuts = np.union1d(bounds, ends)
    firsts, lasts = cuts[:-1], cuts[1:]
    which = np.searchsorted(ends, firsts, side="right")
    shift = pieces[which, 2] - ends[which]  # a token's place in its row, less that in all
    cut = np.stack([pieces[which, 0], firsts + shift, lasts + shift], axis=1)
    places = np.searchsorted(firsts, bounds)
    return [cut[a:b] for a, b in itertools.pairwise(places)]


def _similar(sizes: Numbers, random: np.random.Generator) -> list[int]:
    """Order single pieces: by length in groups, the groups shuffled."""
    by_length = np.argsort(sizes, kind="stable")
    groups = [
        by_length[start : start + SIMILAR_ROWS] for start in range(0, len(by_length), SIMILAR_ROWS)
    ]
    return [int(piece) for place in random.permutation(len(groups)) for piece in groups[place]]


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
