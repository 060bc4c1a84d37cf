"""Vitals: what ranks tell each other once before and once in every optimizer step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.errors import TrainingError
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.batching import StepData
from raytune_ft.training.engine import rank, world_size
from raytune_ft.training.guarding.failures import Elsewhere


@dataclass(frozen=True)
class Vitals:
    """Of all ranks, the same on each."""

    loss_sum: float
    """Over the step's labelled tokens."""
    full: bool
    """Whether any rank's memory was."""
    seconds: list[float]
    """Of forward and backward passes, by rank; in backward passes ranks may wait for each other."""
    waited: list[float]
    """Seconds for the data, by rank."""
    alone: list[float]
    """Seconds of forward passes, in which ranks do not wait for each other: who is slow."""
    sums: dict[str, float]
    """What the objective sums up beside its loss, `TokenLoss.take_sums`."""


def gather(
    loss_sum: float,
    full: bool,
    times: tuple[float, float, float],
    sums: Mapping[str, torch.Tensor],
    device: torch.device,
) -> Vitals:
    """Exchange what this rank knows; float64, summed in the order of ranks.

    Args:
        loss_sum: over this rank's labelled tokens.
        full: whether its memory was.
        times: its `seconds`, `waited` and `alone`.
        sums: as `TokenLoss.take_sums` gives them.
        device: of the engine.
    """
    known = [loss_sum, float(full), *times, *map(float, sums.values())]
    table = exchange(torch.tensor(known, dtype=torch.float64), device)
    losses, flags, passes, waits, forwards, *others = (list(c) for c in zip(*table, strict=True))
    summed = {name: sum(column) for name, column in zip(sums, others, strict=True)}
    return Vitals(sum(losses), any(flags), passes, waits, forwards, summed)


def agree(data: StepData | None, interrupted: bool, step: int, device: torch.device) -> bool:
    """Make sure that every rank has the same step before it; tell whether to stop instead.

    Args:
        data: this rank's; None if it has none.
        interrupted: whether this rank was asked to stop; one is enough.
        step: to be taken, from 1.
        device: of the engine.

    Raises:
        Elsewhere: another rank has no data and tells why.
        TrainingError: ranks have the data of different steps.
    """
    own = torch.tensor([data is not None, interrupted, *_marks(data)], dtype=torch.int64)
    table = exchange(own, device)
    short = [number for number, row in enumerate(table) if not row[0]]
    if short and data is not None:
        raise Elsewhere(f"step {step}: rank {short[0]} has no data, rank {rank()} has")
    odd = [number for number, row in enumerate(table) if row[2:] != table[0][2:]]
    if odd and not short:
        raise TrainingError(
            f"step {step}: rank {odd[0]} has other rows than rank 0; the files changed during the "
            "run, or differ between machines; put them back and resume"
        )
    return any(row[1] for row in table)


def _marks(data: StepData | None) -> list[int]:
    """Return what is the same on all ranks that have the same step."""
    if data is None:
        return [0] * 6
    rows = zlib.crc32(np.asarray(data.row_ids, np.int64).tobytes())
    place = data.position
    return [place.epoch, place.window, place.pack, data.n_targets, data.n_tokens, rows]


def exchange(own: torch.Tensor, device: torch.device) -> list[list[float]]:
    """Return every rank's numbers, in the order of ranks."""
    parts = [own]
    if world_size() > 1:
        own = own.to(device)
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
    table: list[list[float]] = torch.stack(parts).tolist()
    return table


def take_sums(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a loss has summed up since the last call; nothing of any other module."""
    return module.take_sums() if isinstance(module, TokenLoss) else {}


def measures(module: nn.Module, sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the sums of all ranks into what stands in metrics.jsonl."""
    return module.measures(sums) if isinstance(module, TokenLoss) else {}
