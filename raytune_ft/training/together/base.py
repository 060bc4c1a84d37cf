"""Base: recipes that differ in their adapters alone and a model folder in; engines on one base out.

The same parts in the same order as `training.build`, with several adapters where that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raytune_ft.config.estimates.setting import recomputed_layers
from raytune_ft.config.schema import Recipe
from raytune_ft.model import adapter, fast, loading
from raytune_ft.model.fastpath import eighths
from raytune_ft.model.loss import TokenLoss
from raytune_ft.model.seats import Seats
from raytune_ft.training.laid_out import decoder_layers, recompute
from raytune_ft.training.together.passes import Passes, SharedEngine


def build_engines(
    recipes: Sequence[Recipe],
    model_folder: Path,
    device: torch.device,
    at_once: int,
    *,
    resident: bool = False,
) -> tuple[list[SharedEngine], Passes]:
    """Load the model once and make an engine for each recipe's adapter on it.

    Args:
        recipes: which `config.sharing` lets share a base.
        model_folder: checked by `prepare_folder`.
        device: where all of it computes.
        at_once: adapters that may go through the base in one pass.
        resident: whether the fast path keeps NF4 weights unpacked beside the packed ones.

    Returns:
        The engines, in the order of the recipes, and what lets them take turns.
    """
    first = recipes[0]
    eighths.check(first.model.compute, device)
    head_trained = adapter.trains_head(first.lora)
    model: Any = loading.load_model(model_folder, first.model, device, head_trained=head_trained)
    seats = Seats(model)
    for number, recipe in enumerate(recipes):
        seats.add(number, recipe.lora, recipe.train.seed)
    # what refuses an adapter's dropout has to see it
    example = max(range(len(recipes)), key=lambda number: recipes[number].lora.dropout)
    seats.sit(example)
    wrapped = seats.wrapped[example]
    again = recomputed_layers(first, len(decoder_layers(wrapped)), on_gpu=device.type == "cuda")
    recompute(wrapped, again)
    report = fast.install(
        wrapped, device, first.model.fast_path, resident=resident, compute=first.model.compute
    )
    seats.dress(example)
    passes = Passes(seats, at_once)
    dtype = loading.compute_dtype(first.model, device)
    engines = []
    for number, recipe in enumerate(recipes):
        seats.sit(number)
        module = TokenLoss(seats.wrapped[number], report)
        ratio = recipe.lora.loraplus_lr_ratio
        engines.append(
            SharedEngine(
                module, device, recipe.train, dtype, b_lr_ratio=ratio, number=number, passes=passes
            )
        )
    return engines, passes
