"""From a recipe and a model folder to an engine: weights, adapter, loss, ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.model import adapter, loading
from raytune_ft.model.preference import build_loss
from raytune_ft.training import presets
from raytune_ft.training.engine import Engine, TorchEngine, ZeroEngine


def build_engine(
    recipe: Recipe, model_folder: Path, device: torch.device
) -> tuple[Engine, torch.nn.Module]:
    """Load the model, attach the adapter and wrap both into the recipe's engine."""
    head_trained = recipe.model.method == "full" or adapter.trains_head(recipe.lora)
    model: Any = loading.load_model(model_folder, recipe.model, device, head_trained=head_trained)
    if recipe.model.method == "lora":
        model = adapter.attach(model, recipe.lora, recipe.train.seed)
    else:
        model.requires_grad_(True)
    if _recompute(recipe, device):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    dtype = loading.compute_dtype(recipe.model, device)
    config = presets.resolve(recipe, dtype, on_gpu=device.type == "cuda")
    module, ratio = build_loss(model, recipe.train), recipe.lora.loraplus_lr_ratio
    if config is None:
        return TorchEngine(module, device, recipe.train, dtype, b_lr_ratio=ratio), model
    return ZeroEngine(module, device, recipe.train, config, b_lr_ratio=ratio), model


def _recompute(recipe: Recipe, device: torch.device) -> bool:
    choice = recipe.model.gradient_checkpointing
    if choice == "auto":
        return (
            device.type == "cuda" and recipe.data.max_length * recipe.train.micro_batch_size > 512
        )
    return choice
