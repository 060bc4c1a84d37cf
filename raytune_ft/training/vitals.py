"""Vitals: what ranks tell each other once per optimizer step, in one small exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

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


def gather(loss_sum: torch.Tensor, interrupted: bool, seconds: float, waited: float) -> Vitals:
    """Exchange what this rank knows; float64, summed in the order of ranks."""
    own = torch.tensor([float(loss_sum), float(interrupted), seconds, waited], dtype=torch.float64)
    parts = [own]
    if world_size() > 1:
        own = own.to(loss_sum.device)
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
    table = torch.stack(parts).tolist()
    losses, flags, times, waits = (list(column) for column in zip(*table, strict=True))
    return Vitals(sum(losses), any(flags), times, waits)
