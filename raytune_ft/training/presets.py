"""DeepSpeed configurations: presets by name, a user's own JSON, `auto` fields from the recipe.

The presets are XTuner v0.1.9's. A user's number that contradicts the recipe is an error that
names the key, because DeepSpeed would follow one and the loop the other.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from raytune_ft.config import catalog
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError

PRESETS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def resolve(recipe: Recipe, dtype: torch.dtype, *, on_gpu: bool) -> dict[str, Any] | None:
    """Return the complete DeepSpeed configuration, or None for `train.deepspeed: none`."""
    name = recipe.train.deepspeed
    if name == "none":
        return None
    config = _fill_auto(_read(name), recipe, dtype)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise RecipeError(
            f"train.deepspeed: '{name}' is ZeRO stage 3, which this version does not train; "
            "use zero2 or zero2_offload"
        )
    if not on_gpu:
        # a CPU has no side stream to overlap on, and DeepSpeed warns about it
        config.get("zero_optimization", {})["overlap_comm"] = False
    return config


def _read(name: str) -> dict[str, Any]:
    is_preset = name in PRESETS
    path = (
        catalog.configs_dir() / "deepspeed" / f"deepspeed_{name}.json" if is_preset else Path(name)
    )
    if not path.is_file():
        raise RecipeError(
            f"train.deepspeed: '{name}' is neither a file nor one of {', '.join(PRESETS)}, none"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _fill_auto(config: dict[str, Any], recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    config = copy.deepcopy(config)
    train = recipe.train
    wanted: dict[str, float] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_norm,
    }
    for key, value in wanted.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise RecipeError(
                f"train.deepspeed: '{key}' is {given} in the file, but the recipe says {value}; "
                'write "auto" there'
            )
        config[key] = value
    config["fp16"] = {"enabled": dtype == torch.float16, "initial_scale_power": 16}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    if "optimizer" in config or "scheduler" in config:
        raise RecipeError(
            "train.deepspeed: remove 'optimizer' and 'scheduler' from the file; "
            "the recipe's train section sets both"
        )
    config["zero_allow_untested_optimizer"] = True
    config["steps_per_print"] = 2**31
    return config
