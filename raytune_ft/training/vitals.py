"""Vitals: what ranks tell each other once per optimizer step, in one small exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.engine import world_size


@dataclass(frozen=True)
class Vitals:
    """Of all ranks, the same on each."""

    loss_sum: float
    """Over the step's labelled tokens."""
    interrupted: bool
    """Whether any rank was asked to stop."""
    seconds: list[float]
    """Of forward and backward passes, by rank: who is slow."""
    waited: list[float]
    """Seconds for the data, by rank."""
    sums: dict[str, float]
    """What the objective sums up beside its loss, `TokenLoss.take_sums`."""


def gather(
    loss_sum: torch.Tensor,
    interrupted: bool,
    seconds: float,
    waited: float,
    sums: Mapping[str, torch.Tensor],
) -> Vitals:
    """Exchange what this rank knows; float64, summed in the order of ranks."""
    known = [float(loss_sum), float(interrupted), seconds, waited, *map(float, sums.values())]
    own = torch.tensor(known, dtype=torch.float64)
    parts = [own]
    if world_size() > 1:
        own = own.to(loss_sum.device)
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
    table = torch.stack(parts).tolist()
    losses, flags, times, waits, *others = (list(column) for column in zip(*table, strict=True))
    summed = {name: sum(column) for name, column in zip(sums, others, strict=True)}
    return Vitals(sum(losses), any(flags), times, waits, summed)


def take_sums(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a loss has summed up since the last call; nothing of any other module."""
    return module.take_sums() if isinstance(module, TokenLoss) else {}


def measures(module: nn.Module, sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the sums of all ranks into what stands in metrics.jsonl."""
    return module.measures(sums) if isinstance(module, TokenLoss) else {}
