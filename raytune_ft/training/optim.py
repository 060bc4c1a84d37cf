"""Optimizers by recipe name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from raytune_ft.config.schema import TrainSection


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], train: TrainSection
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over `parameters`; its lr is set anew at each step."""
    options: dict[str, Any]
    options = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes as bnb

    classes = {
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
    }
    optimizer: torch.optim.Optimizer = classes[train.optimizer](parameters, **options)
    return optimizer
