"""Micro-shapes: a micro-batch on the host in, one row of numbers of a fixed size out.

What a CUDA graph reads has the same size in each replay. Rows are padded to the longest there may
be, bounds of segments by empty segments, and places whose next token is predicted by others, whose
losses are not counted. A size is rounded up, so that few graphs serve all batches of a run.

Shapes: B = rows, L = tokens of the longest row there may be, S = segments, padding among them,
T = predicted tokens, C = places that are computed, T or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raytune_ft.config.estimates.footprint import LOGIT_ROWS
from raytune_ft.model.loss import bounds_of
from raytune_ft.training.batching import TensorBatch

PLACES_STEP = 2 * LOGIT_ROWS
"""C is a multiple of it, or B * L: the head takes as many rows at a time."""
FEWEST_SEGMENTS = 8
"""S is a power of two from here on."""


@dataclass(frozen=True)
class Numbers:
    """Parts of such a row, int64; on the host or the device."""

    count: torch.Tensor
    """(1,): T."""
    cu_seqlens: torch.Tensor
    """(S + 1,): bounds in the B * L tokens end to end; empty segments at the end."""
    input_ids: torch.Tensor
    """(B, L)."""
    position_ids: torch.Tensor
    """(B, L)."""
    places: torch.Tensor
    """(C,): tokens whose next one is predicted, in order, then others; none twice."""
    targets: torch.Tensor
    """(C,): ids of the next tokens, 0 behind the first T."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch; those with the same ones share a graph."""

    rows: int
    length: int
    places: int
    segments: int

    @classmethod
    def holding(cls, batch: TensorBatch, length: int) -> Shape | None:
        """Return the smallest shape that holds a batch of `batching.to_tensors`; None if none does.

        Args:
            batch: on the host.
            length: L.
        """
        rows, own = batch["input_ids"].shape
        if own > length:
            return None
        wanted = max(1, len(batch["places"]))
        places = min(-(-wanted // PLACES_STEP) * PLACES_STEP, rows * length)
        # padding at a row's end is a segment, which the longest row has or gets
        segments = len(batch["cu_seqlens"]) - 1
        if own < length:
            segments += int((batch["segment_ids"][:, -1] >= 0).sum())
        if segments > rows:  # rows of one sample each have a faster kernel, by this very number
            segments = max(FEWEST_SEGMENTS, 1 << (segments - 1).bit_length())
        return cls(rows, length, places, segments)

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return 2 + self.segments + 2 * self.rows * self.length + 2 * self.places

    def parts(self, row: torch.Tensor) -> Numbers:
        """Return the parts of a row (size,), as views."""
        tokens = self.rows * self.length
        sizes = [1, self.segments + 1, tokens, tokens, self.places, self.places]
        count, bounds, ids, positions, places, targets = torch.split(row, sizes)
        square = (self.rows, self.length)
        return Numbers(count, bounds, ids.view(square), positions.view(square), places, targets)

    def row(self, batch: TensorBatch) -> torch.Tensor:
        """Lay a batch that this shape holds out as one row (size,), int64, on the host."""
        row = torch.zeros(self.size, dtype=torch.int64)
        parts = self.parts(row)
        own = batch["input_ids"].shape[1]
        parts.input_ids[:, :own] = batch["input_ids"]
        parts.position_ids[:, :own] = batch["position_ids"]
        segments = nn.functional.pad(batch["segment_ids"], (0, self.length - own), value=-1)
        bounds = bounds_of(segments)
        parts.cu_seqlens.fill_(self.rows * self.length)
        parts.cu_seqlens[: len(bounds)] = bounds
        self._lay_places(parts, batch, own)
        return row

    def _lay_places(self, parts: Numbers, batch: TensorBatch, own: int) -> None:
        given = batch["places"]
        count = len(given)
        parts.count.fill_(count)
        parts.targets[:count] = batch["labels"].flatten()[given + 1]
        parts.places[:count] = given // own * self.length + given % own
        # others, each once: the way back adds up what came from one place, in any order
        free = torch.ones(self.rows * self.length, dtype=torch.bool)
        free[parts.places[:count]] = False
        parts.places[count:] = free.nonzero().flatten()[: self.places - count]
