"""Batching: the one sequence of packs in, one rank's micro-batches per optimizer step out.

G = micro_batch_size * accumulation * workers packs make one optimizer step. Rank k takes packs
k, k + workers, ... of each group, so the step's content does not depend on the number of ranks.
A step never crosses an epoch's end: its last group may be short, and ranks without a pack get
batches without a label, which add zero to loss and gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from raytune_ft.data.packing import IGNORE_INDEX, Pack, Position, collate
from raytune_ft.data.places import Placed
from raytune_ft.data.report import Report, add_report, new_report

TensorBatch = dict[str, torch.Tensor]


class Sizes(Protocol):
    """How packs become micro-batches, fields of `TrainSection`.

    They may change between steps, but not the product of the first two.
    """

    @property
    def micro_batch_size(self) -> int: ...

    @property
    def accumulation(self) -> int: ...

    @property
    def objective(self) -> str: ...


@dataclass(frozen=True)
class StepData:
    """What one rank needs for one optimizer step.

    `n_packs`, `n_targets`, `n_tokens`, `n_pairs` and `row_ids` are those of all ranks together.
    """

    micro_batches: list[TensorBatch]
    n_packs: int
    n_targets: int
    n_tokens: int
    row_ids: list[int]
    position: Position
    """Where the stream goes on after this step."""
    epoch: int
    progress: float
    """Epochs of rows visited behind this step."""
    report: Report
    """What became of the rows of windows that this step is the first to tell of."""
    n_pairs: int = 0
    """Sum of the squared lengths of all segments: what attention costs."""
    remade: Callable[[], StepData] | None = None
    """Makes the same step again, of micro-batches as large as they are to be by now."""

    @property
    def ends_epoch(self) -> bool:
        """Whether an epoch ends behind this step."""
        return self.position.epoch > self.epoch


def count_targets(pack: Pack) -> int:
    """Count labels that are predicted: a sample's first token has nothing before it."""
    labelled = pack.labels != IGNORE_INDEX
    labelled[pack.cu_seqlens[:-1]] = False
    return int(labelled.sum())


def count_chosen(pack: Pack) -> int:
    """Count labels that are predicted in a pack of pairs' chosen answers, every other segment."""
    bounds = pack.cu_seqlens
    chosen = np.repeat(np.arange(len(bounds) - 1) % 2 == 0, np.diff(bounds))
    chosen[bounds[:-1]] = False
    return int((chosen & (pack.labels != IGNORE_INDEX)).sum())


def steps(
    packs: Iterable[Placed],
    train: Sizes,
    *,
    rank: int,
    workers: int,
    packs_per_step: int | None = None,
) -> Iterator[StepData]:
    """Group packs into optimizer steps and keep this rank's share.

    Args:
        packs: in canonical order.
        train: `micro_batch_size`, `accumulation` and `objective` are read.
        rank: 0 <= rank < workers.
        workers: number of ranks.
        packs_per_step: of an optimizer step, where its ranks have room for more; None: for G.
    """
    group_size = packs_per_step or train.micro_batch_size * train.accumulation * workers
    group: list[Placed] = []
    for placed in packs:
        group.append(placed)
        if len(group) == group_size or placed.behind.window == placed.behind.pack == 0:
            yield _step(group, train, rank, workers)
            group = []


def _step(group: list[Placed], train: Sizes, rank: int, workers: int) -> StepData:
    mine = [placed.pack for placed in group[rank::workers]]
    size = train.micro_batch_size
    chunks = [mine[i * size : (i + 1) * size] for i in range(train.accumulation)]
    behind, report = group[-1].behind, new_report()
    for placed in group:
        add_report(report, placed.report)
    packs = [placed.pack for placed in group]
    n_targets = sum(count_targets(pack) for pack in packs)
    batches = [to_tensors(collate(chunk)) if chunk else empty_batch() for chunk in chunks]
    pairs = train.objective != "sft"
    if pairs:
        weights = pair_weights(packs, n_targets)
        batches = [{**batch, **weights} for batch in batches]
    return StepData(
        micro_batches=batches,
        n_packs=len(group),
        n_targets=n_targets,
        n_tokens=sum(len(pack.input_ids) for pack in packs),
        n_pairs=sum(int((np.diff(pack.cu_seqlens).astype(np.int64) ** 2).sum()) for pack in packs),
        # both answers of a pair have its row's number
        row_ids=[int(row) for pack in packs for row in pack.row_ids[:: 2 if pairs else 1]],
        position=behind,
        epoch=behind.epoch - (behind.window == behind.pack == 0),
        progress=group[-1].progress,
        report=report,
        remade=functools.partial(_step, group, train, rank, workers),
    )


def pair_weights(packs: Sequence[Pack], n_targets: int) -> TensorBatch:
    """Return the factors by which a step's sums become means, float64 scalars on the host.

    Engines divide by a step's labelled tokens; `preference.PreferenceLoss` multiplies the losses
    of pairs and those of chosen answers' tokens by these.
    """
    counts = {
        "pair_weight": sum(len(pack.row_ids) // 2 for pack in packs),
        "chosen_weight": sum(count_chosen(pack) for pack in packs),
    }
    return {
        name: torch.tensor(n_targets / max(1, count), dtype=torch.float64)
        for name, count in counts.items()
    }


def to_tensors(batch: dict[str, np.ndarray]) -> TensorBatch:
    """Turn a collated batch, arrays of shape (B, L), into int64 tensors, with its bounds.

    For kernels that take the B * L tokens end to end it has `cu_seqlens` int32 (S + 1,), where
    segments begin and end in them, from 0 to B * L, and `max_seqlen`, a scalar, the longest
    segment's tokens. The padding of a row is a segment as well. `places` int64 (T,) are the
    tokens whose next one is predicted, so that nobody waits for a device to count them.
    """
    tensors = {key: torch.from_numpy(value.astype(np.int64)) for key, value in batch.items()}
    segments = batch["segment_ids"]
    begins = np.ones(segments.shape, dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    bounds = np.append(np.flatnonzero(begins), segments.size).astype(np.int32)
    tensors["cu_seqlens"] = torch.from_numpy(bounds)
    tensors["max_seqlen"] = torch.tensor(int(np.diff(bounds).max()), dtype=torch.int32)
    ahead = np.zeros(segments.shape, dtype=bool)
    ahead[:, :-1] = ~begins[:, 1:] & (segments[:, 1:] >= 0)
    ahead[:, :-1] &= batch["labels"][:, 1:] != IGNORE_INDEX
    tensors["places"] = torch.from_numpy(np.flatnonzero(ahead))
    return tensors


def empty_batch() -> TensorBatch:
    """Make a batch of two tokens without a label, so that every rank runs every micro-step."""
    row = np.zeros((1, 2), np.int32)
    labels = np.full((1, 2), IGNORE_INDEX, np.int32)
    positions = np.arange(2, dtype=np.int32)[None]
    return to_tensors(
        {"input_ids": row, "labels": labels, "position_ids": positions, "segment_ids": row}
    )
