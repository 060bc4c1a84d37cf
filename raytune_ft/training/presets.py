"""DeepSpeed configurations: a recipe in, complete keys out, `auto` filled from the recipe."""

from __future__ import annotations

import copy
from typing import Any

import torch

from raytune_ft.config import zero
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.training.engine.scaling import INITIAL_POWER, WINDOW


def resolve(recipe: Recipe, dtype: torch.dtype, *, on_gpu: bool) -> dict[str, Any] | None:
    """Return the complete DeepSpeed configuration.

    None: `train.deepspeed: none`, or a file of stage 0, which shards nothing.

    Raises:
        RecipeError: there is no such file, or one of its keys cannot be followed.
    """
    name = recipe.train.deepspeed
    if name == "none":
        return None
    config = copy.deepcopy(zero.read(name))
    if found := zero.problem(config, recipe, str(dtype).removeprefix("torch.")):
        raise RecipeError(f"train.deepspeed: {name}: {found}")
    if zero.stage_of(config) == 0:
        return None
    config |= zero.wanted(recipe)
    del config["train_batch_size"]  # DeepSpeed's product of the others, by the ranks there are
    config["fp16"] = _half(config, "fp16", dtype == torch.float16)
    config["bf16"] = _half(config, "bf16", dtype == torch.bfloat16)
    config["zero_optimization"] = _without_auto(config["zero_optimization"])
    if dtype != torch.float32:
        _sum_in_float32(config)
    if not on_gpu:
        # a CPU has no side stream to overlap on, and DeepSpeed warns about it
        config["zero_optimization"]["overlap_comm"] = False
    # the client's torch AdamW steps offloaded weights: DeepSpeed's own is compiled at the start
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    config.setdefault("steps_per_print", 2**31)
    return config


def _half(config: dict[str, Any], key: str, enabled: bool) -> dict[str, Any]:
    block = {**_without_auto(config.get(key, {})), "enabled": enabled}
    if key == "fp16":
        # one overflow halves the scale: the loop takes the same step again, not another
        law = {"initial_scale_power": INITIAL_POWER, "loss_scale_window": WINDOW, "hysteresis": 1}
        block = {**law, **block}
    return block


def _sum_in_float32(config: dict[str, Any]) -> None:
    """Add up half-precision gradients in float32, over micro-batches and over ranks.

    DeepSpeed's default is the weights' own type: each sum of bfloat16 numbers keeps 8 bits, so
    that a long window of micro-batches loses small gradients.
    """
    config.setdefault("communication_data_type", "fp32")
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    """Leave to DeepSpeed what a file leaves open."""
    return {key: value for key, value in block.items() if value != zero.AUTO}
