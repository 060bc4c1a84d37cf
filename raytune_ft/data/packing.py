"""Packing: which rows of a window share a pack, from their lengths alone; and the packs.

Stage 4 of the data's way (encode -> **pack** -> batch). Pure NumPy: no torch, no ray. `order`
decides which rows make a window. A piece is a row or a stretch of one.

Shapes: L = longest pack of a batch, T = tokens of a window, K = pieces, P = packs, n = tokens of
one pack, S = segments in one pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX, Example

__all__ = [
    "IGNORE_INDEX",
    "Pack",
    "Pieces",
    "Position",
    "WindowTokens",
    "build_packs",
    "collate",
    "divide_rows",
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
    `row_ids` int64 (S,), the number of each segment's row. A segment is a piece, and its first
    label is IGNORE_INDEX. A pair is two segments, chosen and rejected, with the same number. Only
    with `data.compat` a pack is one segment of many pieces.
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


@dataclass(frozen=True)
class Pieces:
    """Packs as slices of rows.

    `pieces` int64 (K, 3): row, first token, token behind the last; `ends` int64 (P + 1,): pack p
    is `pieces[ends[p] : ends[p + 1]]`.
    """

    pieces: Numbers
    ends: Numbers

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.ends) - 1

    @property
    def sizes(self) -> Numbers:
        """Tokens of each piece, int64 (K,)."""
        return self.pieces[:, 2] - self.pieces[:, 1]

    def pack(self, number: int) -> Numbers:
        """Return a pack's pieces, int64 (pieces, 3)."""
        return self.pieces[self.ends[number] : self.ends[number + 1]]

    def take(self, packs: Numbers) -> Pieces:
        """Return these packs alone, in this order."""
        counts = np.diff(self.ends)[packs]
        return Pieces(self.pieces[_spans(self.ends[packs], counts)], _bounds(counts))


def pack_lengths(lengths: Sequence[int] | Numbers | Ints, max_length: int) -> Numbers:
    """Group items into packs of at most `max_length`, best fit in order of decreasing length.

    An item joins the pack with the least room that holds it, of several the one opened first.
    O(n log n) for the sort and O(log n) per item.

    Args:
        lengths: each at least 1 and at most `max_length`.
        max_length: tokens per pack.

    Returns:
        The number of each item's pack, int64 (n,); packs are numbered as they are opened.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return sizes
    if not 1 <= sizes.min() <= sizes.max() <= max_length:
        raise ValueError(f"lengths must lie in 1..{max_length}: {sizes.min()}..{sizes.max()}")
    order = np.argsort(-sizes, kind="stable")
    bits = len(sizes).bit_length()
    # room and number in one integer: a sorted list of them finds, takes and puts back a pack
    shifted = (sizes[order] << bits).tolist()
    smallest, opened, new = shifted[-1], 0, max_length << bits
    rooms: list[int] = []
    found: list[int] = []
    for size in shifted:
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room = new + opened
            opened += 1
        else:
            room = rooms.pop(place)
        found.append(room & ((1 << bits) - 1))
        room -= size
        if room >= smallest:
            insort(rooms, room)
    packs = np.empty_like(sizes)
    packs[order] = found
    return packs


def divide_rows(lengths: Sequence[int] | Numbers | Ints, data: DataSection) -> Numbers:
    """Divide rows into stretches of at most `max_length`; `concat` takes them whole.

    Args:
        lengths: tokens of each row, in the order of the visit; 0 for a row that is left out.
        data: `packing` and `max_length` are read.

    Returns:
        int64 (K, 3): row (index into `lengths`), first token, token behind the last.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limit = data.max_length if data.packing != "concat" else max(1, int(sizes.max(initial=1)))
    counts = -(-sizes // limit)
    rows = np.repeat(np.arange(len(sizes)), counts)
    starts = _spans(np.zeros_like(counts), counts) * limit
    return np.stack([rows, starts, np.minimum(starts + limit, sizes[rows])], axis=1)


def pack_pieces(pieces: Numbers, data: DataSection, random: np.random.Generator) -> Pieces:
    """Decide which pieces share a pack.

    Args:
        pieces: int64 (K, 3), as `divide_rows` gives them.
        data: `packing` and `max_length` are read.
        random: decides the order of the packs.

    Returns:
        The packs in their final order.
    """
    sizes = pieces[:, 2] - pieces[:, 1]
    if data.packing == "none":
        ordered = pieces[_similar(sizes, random)]
        return Pieces(ordered, np.arange(len(ordered) + 1, dtype=np.int64))
    if data.packing == "concat":
        packed = _concat(pieces, data.max_length)
    else:
        numbers = pack_lengths(sizes, data.max_length)
        packed = Pieces(pieces[np.argsort(numbers, kind="stable")], _bounds(np.bincount(numbers)))
    return packed.take(random.permutation(len(packed)))


def _concat(pieces: Numbers, max_length: int) -> Pieces:
    """Lay pieces end to end and cut every `max_length` tokens; the last pack may be short."""
    ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.append(np.arange(0, total, max_length), total)
    cuts = np.union1d(bounds, ends)
    firsts, lasts = cuts[:-1], cuts[1:]
    which = np.searchsorted(ends, firsts, side="right")
    shift = pieces[which, 2] - ends[which]  # a token's place in its row, less that in all
    cut = np.stack([pieces[which, 0], firsts + shift, lasts + shift], axis=1)
    return Pieces(cut, np.searchsorted(firsts, bounds))


def _similar(sizes: Numbers, random: np.random.Generator) -> Numbers:
    """Order single pieces: by length in groups, the groups shuffled."""
    full = len(sizes) // SIMILAR_ROWS
    # a short group comes last, so that it moves no border between the others
    groups = np.append(random.permutation(full), full)
    starts = groups * SIMILAR_ROWS
    counts = np.minimum(SIMILAR_ROWS, len(sizes) - starts)
    return np.argsort(sizes, kind="stable")[_spans(starts, counts)]


@dataclass(frozen=True)
class WindowTokens:
    """The rows of a window end to end, those that are left out with no token.

    `input_ids`, `labels` int32 (T,); `ends` int64 (rows + 1,): row r is tokens `ends[r]` to
    `ends[r + 1]`; `chosen` int64 (rows,): of pairs, tokens of the chosen answer, which those of
    the rejected one follow.
    """

    input_ids: Ints
    labels: Ints
    ends: Numbers
    chosen: Numbers | None = None

    @classmethod
    def of(cls, examples: Sequence[Example | None]) -> WindowTokens:
        """Lay examples end to end; None is a row that is left out."""
        used = [example for example in examples if example is not None]
        sizes = [0 if example is None else len(example.input_ids) for example in examples]
        chosen = [0 if example is None else example.n_chosen for example in examples]
        none = np.zeros(0, np.int32)
        return cls(
            np.concatenate([none, *(example.input_ids for example in used)]),
            np.concatenate([none, *(example.labels for example in used)]),
            _bounds(np.array(sizes, dtype=np.int64)),
            np.array(chosen, dtype=np.int64) if any(chosen) else None,
        )

    @property
    def lengths(self) -> Numbers:
        """Tokens of each row, int64 (rows,)."""
        return np.diff(self.ends)

    def targets(self, pieces: Numbers) -> Numbers:
        """Count what is learned of each piece, int64 (K,); its first token has none before it."""
        before = _bounds(self.labels != IGNORE_INDEX)
        starts = self.ends[pieces[:, 0]]
        counts: Numbers = before[starts + pieces[:, 2]] - before[starts + pieces[:, 1] + 1]
        return counts

    def packs(self, laid: Pieces, row_ids: Numbers, *, isolated: bool = True) -> list[Pack]:
        """Build packs.

        Args:
            laid: which stretches of the rows stand in which pack.
            row_ids: int64 (rows,), the numbers of the rows.
            isolated: each piece is a segment of its own, of a pair two; if not, a pack is one
                segment.
        """
        rows, firsts = laid.pieces[:, 0], laid.pieces[:, 1]
        tokens = _spans(self.ends[rows] + firsts, laid.sizes)
        labels = self.labels[tokens]
        sizes, counts = laid.sizes, np.diff(laid.ends)
        if self.chosen is not None:
            chosen = self.chosen[rows]
            sizes = np.stack([chosen, sizes - chosen], axis=1).ravel()
            counts, rows = 2 * counts, np.repeat(rows, 2)
        n_rows = counts
        if isolated:
            labels[_bounds(sizes)[:-1]] = IGNORE_INDEX
        else:
            sizes = np.diff(_bounds(sizes)[laid.ends])
            counts = np.ones_like(sizes)
        return build_packs(self.input_ids[tokens], labels, sizes, counts, row_ids[rows], n_rows)


def build_packs(
    input_ids: Ints,
    labels: Ints,
    sizes: Numbers | Ints,
    segments: Numbers | Ints,
    row_ids: Numbers,
    rows: Numbers | Ints,
) -> list[Pack]:
    """Divide the packs of a window that lie end to end; each is a view of the whole.

    Args:
        input_ids: (T,).
        labels: (T,).
        sizes: tokens of each segment of all packs; positions restart at each.
        segments: (P,), segments of each pack.
        row_ids: the rows of all packs.
        rows: (P,), how many of `row_ids` are each pack's.
    """
    ends = _bounds(sizes)
    positions = _spans(np.zeros(len(sizes), np.int64), sizes).astype(np.int32)
    packs = []
    first_segment = first_row = 0
    for n_segments, n_rows in zip(segments.tolist(), rows.tolist(), strict=True):
        cuts = ends[first_segment : first_segment + n_segments + 1]
        start, stop = int(cuts[0]), int(cuts[-1])
        packs.append(
            Pack(
                input_ids=input_ids[start:stop],
                labels=labels[start:stop],
                position_ids=positions[start:stop],
                cu_seqlens=(cuts - start).astype(np.int32),
                row_ids=row_ids[first_row : first_row + n_rows],
            )
        )
        first_segment, first_row = first_segment + n_segments, first_row + n_rows
    return packs


def _bounds(sizes: npt.NDArray[np.generic]) -> Numbers:
    """Return where things of these sizes begin and end, laid end to end; int64 (sizes + 1,)."""
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds


def _spans(starts: Numbers, sizes: Numbers | Ints) -> Numbers:
    """Return the numbers from each start on, `sizes` of them each, as one array."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    spans: Numbers = np.arange(total, dtype=np.int64)
    spans += np.repeat(starts - (ends - sizes), sizes)
    return spans


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
