"""ZeRO: a preset's name or a user's JSON in, its keys checked against the recipe out.

The presets are XTuner v0.1.9's. A key that contradicts the recipe, or that nothing here follows,
is an error that names it, because DeepSpeed would do one thing and the loop another.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.config import catalog
from raytune_ft.errors import RecipeError

if TYPE_CHECKING:
    from raytune_ft.config.schema import Recipe

PRESETS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
AUTO = "auto"
ELSEWHERE = {
    "optimizer": "train.optimizer, lr, betas and weight_decay set it",
    "scheduler": "train.scheduler, warmup_ratio and min_lr set it",
    "activation_checkpointing": "model.gradient_checkpointing sets it",
}
"""Keys of the file that the recipe decides as a whole."""
FREE = (
    "communication_data_type", "data_types", "dump_state", "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
HALVES = {"fp16": "float16", "bf16": "bfloat16"}
FREE_OF_HALVES = {
    "fp16": (
        "enabled", "consecutive_hysteresis", "hysteresis", "initial_scale_power",
        "loss_scale", "loss_scale_window", "min_loss_scale",
    ),
    "bf16": ("enabled", "check_grad_overflow"),
}  # fmt: skip
FREE_OF_ZERO = (
    "stage", "allgather_bucket_size", "allgather_partitions", "contiguous_gradients",
    "ignore_unused_parameters", "memory_efficient_linear", "offload_optimizer", "offload_param",
    "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip
FREE_OF_OFFLOAD = ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init")
OFFLOADS = ("offload_optimizer", "offload_param")
WHOLE_GRADIENTS = 2**28
"""Trained weights, a GiB of float32 gradients: up to here `zero2` lets every rank keep them all."""


def read(name: str) -> dict[str, Any]:
    """Read the file of a preset, or a user's own.

    Raises:
        RecipeError: there is no such file, or it is no JSON object.
    """
    is_preset = name in PRESETS
    folder = catalog.configs_dir() / "deepspeed"
    path = folder / f"deepspeed_{name}.json" if is_preset else Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"train.deepspeed: '{name}' is neither a file nor one of {', '.join(PRESETS)}, none"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def stage_of(config: dict[str, Any]) -> int:
    """Return the stage that a file asks for; 0 shards nothing."""
    stage = _block(config, "zero_optimization").get("stage", 0)
    return stage if stage in (1, 2, 3) else 0


def offloads(config: dict[str, Any]) -> list[str]:
    """Return which of optimizer and parameters a file keeps on the host."""
    zero = _block(config, "zero_optimization")
    return [key for key in OFFLOADS if _block(zero, key).get("device", "none") != "none"]


def asked(name: str) -> tuple[int, list[str]]:
    """Return the stage that `train.deepspeed` means, and what is offloaded.

    (0, []) for `none`, and for a file that is not here or is none: whoever reads it says so.
    """
    if name in PRESETS:  # without a look at its file: every recipe of a list asks
        stage = int(name.removeprefix("zero")[0])
        return stage, list(OFFLOADS[: stage - 1]) if name.endswith("offload") else []
    try:
        content = {} if name == "none" else read(name)
    except RecipeError:
        return 0, []
    return stage_of(content), offloads(content)


def sums_once(name: str, trained: int, accumulation: int) -> bool:
    """Tell whether the preset `zero2` sums gradients over ranks once a step, as stage 1 does.

    DeepSpeed's stage 2 does it behind every micro-step, so that no rank has to keep the gradients
    of weights that others step. An adapter's are small enough to be kept, and the network then
    carries one sum per step instead of `accumulation` of them; one rank, which sends nothing, is
    spared the copies of each micro-step. A user's own file is followed.

    Args:
        name: `train.deepspeed`.
        trained: number of trained weights.
        accumulation: micro-steps per step.
    """
    return name == "zero2" and accumulation > 1 and trained <= WHOLE_GRADIENTS


def unsharded(optimizer: str) -> str | None:
    """Say why ZeRO cannot spread an optimizer's state over ranks, and what to do; None if it can.

    ZeRO lays weights end to end and cuts them anywhere: numbers must not depend on their
    neighbours.
    """
    if optimizer == "muon":
        return "cuts up the matrices that train.optimizer 'muon' needs whole; set it to none"
    if optimizer.endswith("8bit"):
        return (
            f"cuts up the blocks in which train.optimizer '{optimizer}' keeps its averages; set "
            "it to none, or use paged_adamw_32bit"
        )
    return None


def wanted(recipe: Recipe) -> dict[str, float]:
    """Return the numbers of a file that the recipe decides; they may be `auto` there."""
    train = recipe.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_norm,
        "train_batch_size": recipe.global_batch_size,
    }


def problem(config: dict[str, Any], recipe: Recipe, dtype: str) -> str | None:
    """Return the first key that cannot be followed, with what to do; None if all can.

    Args:
        config: content of the file.
        recipe: it is to go with.
        dtype: that the model computes in, or `auto` where that is not known yet.
    """
    numbers = wanted(recipe)
    for key, given in config.items():
        if key in ELSEWHERE:
            return f"'{key}': remove it from the file; {ELSEWHERE[key]}"
        if key in numbers and given not in (AUTO, numbers[key]):
            return f"'{key}' is {given} in the file, but the recipe says {numbers[key]}; {_WRITE}"
        if key in HALVES and (found := _half_problem(key, given, dtype)):
            return found
    if found := _unknown("data_types.", _block(config, "data_types"), ("grad_accum_dtype",)):
        return found
    known = (*numbers, *HALVES, *FREE, "zero_optimization")
    return _unknown("", config, known) or _zero_problem(_block(config, "zero_optimization"))


_WRITE = 'write "auto" there'


def _half_problem(key: str, block: Any, dtype: str) -> str | None:
    if not isinstance(block, dict):
        return f"'{key}': expected an object, got {json.dumps(block)}"
    given, meant = block.get("enabled", AUTO), HALVES[key]
    if given not in (AUTO, True, False):
        return f"'{key}.enabled': expected true, false or \"auto\", got {json.dumps(given)}"
    if AUTO not in (given, dtype) and given is not (dtype == meant):
        return (
            f"'{key}.enabled' is {json.dumps(given)} in the file, but the model computes in "
            f"{dtype}; {_WRITE}, or set model.dtype"
        )
    if block.get("loss_scale", 0) not in (0, AUTO):
        return f"'{key}.loss_scale' is fixed; write 0, so that it falls where gradients overflow"
    return _unknown(f"{key}.", block, FREE_OF_HALVES[key])


def _zero_problem(zero: dict[str, Any]) -> str | None:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        return f"'zero_optimization.stage': expected 0, 1, 2 or 3, got {json.dumps(stage)}"
    for key in OFFLOADS:
        where, block = f"zero_optimization.{key}", _block(zero, key)
        device = block.get("device", "none")
        if device not in ("none", "cpu"):
            return f'\'{where}.device\': expected "cpu" or "none", got {json.dumps(device)}'
        if found := _unknown(f"{where}.", block, FREE_OF_OFFLOAD):
            return found
    if _block(zero, "offload_param").get("device", "none") != "none" and stage != 3:
        return "'zero_optimization.offload_param' needs stage 3; remove it, or write stage 3"
    if _block(zero, "offload_optimizer").get("device", "none") != "none" and stage == 0:
        return "'zero_optimization.offload_optimizer' needs a stage; write stage 2"
    return _unknown("zero_optimization.", zero, FREE_OF_ZERO)


def _unknown(where: str, block: dict[str, Any], known: tuple[str, ...]) -> str | None:
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            hint = f"did you mean '{near[0]}'?" if near else "remove it; nothing here follows it"
            return f"'{where}{key}': {hint}"
    return None


def _block(config: dict[str, Any], key: str) -> dict[str, Any]:
    block = config.get(key) or {}
    return block if isinstance(block, dict) else {}
