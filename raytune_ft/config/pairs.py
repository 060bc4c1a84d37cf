"""Pairs: settings that do not work together, in one table; a recipe in, what to use instead out.

What is refused here is refused before anything loads. What depends on the model's files or on the
machine is checked in `survey`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytune_ft.config.schema import Recipe


def problem(recipe: Recipe) -> str | None:
    """Return the first pair that does not work, named with what to use instead; None if all do."""
    return next(_problems(recipe), None)


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _of_method(recipe)
    yield from _of_objective(recipe)
    yield from _of_evaluation(recipe)


def _of_method(recipe: Recipe) -> Iterator[str]:
    model, zero = recipe.model, recipe.train.deepspeed
    if model.quantization != "none" and model.method == "full":
        yield (
            f"model.method 'full' cannot train {model.quantization} weights; "
            "set model.quantization: none, or model.method: lora"
        )
    if model.quantization != "none" and zero.startswith("zero3"):
        yield f"train.deepspeed '{zero}' cannot shard {model.quantization} weights; use zero2"
    if recipe.train.min_lr > recipe.train.lr:
        yield "train.min_lr is above train.lr; lower train.min_lr"


def _of_objective(recipe: Recipe) -> Iterator[str]:
    objective, data = recipe.train.objective, recipe.data
    if objective == "sft":
        return
    if data.compat is not None:
        yield (
            f"data.compat {data.compat} had no train.objective '{objective}'; leave data.compat "
            "out, or set train.objective: sft"
        )
    if data.packing == "concat":
        yield f"data.pack 'concat' would cut the pairs of train.objective '{objective}'; use true"
    if data.over_length == "split":
        yield (
            f"data.over_length 'split' would part the pairs of train.objective '{objective}'; "
            "use cut, drop or error"
        )
    if any(source.loss == "all" for source in data.sources):
        yield (
            f"data.sources[].loss 'all' has no meaning for train.objective '{objective}', which "
            "compares last answers; leave it out"
        )
    if objective == "dpo" and recipe.train.deepspeed.startswith("zero3"):
        yield (
            f"train.deepspeed '{recipe.train.deepspeed}' shards the weights that train.objective "
            "'dpo' compares with those of the start; use zero2, or train.objective: orpo"
        )


def _of_evaluation(recipe: Recipe) -> Iterator[str]:
    wanted = recipe.eval
    needs_rows = {
        "eval.patience": wanted.patience is not None,
        "eval.export: best": wanted.export == "best",
        "eval.metrics": bool(wanted.metrics),
    }
    for name, asked in needs_rows.items():
        if asked and recipe.data.validation is None:
            yield f"{name} needs held-out rows; set data.validation, such as 0.1"
    preference = recipe.train.objective != "sft"
    if preference and wanted.metrics:
        yield (
            "eval.metrics compare an answer with a row's own, and preference rows have two; "
            "set eval.metrics: [], or train.objective: sft"
        )
    better = {"val_loss": "min", "val_perplexity": "min"}
    if preference:
        better = {"val_loss": "min", "val_rewards_accuracy": "max", "val_rewards_margin": "max"}
    better |= {f"val_{name}": "max" for name in wanted.metrics}
    if wanted.metric not in better:
        yield (
            f"eval.metric '{wanted.metric}' is not measured; choose "
            f"{', '.join(sorted(better))}, or name it in eval.metrics"
        )
    elif wanted.mode != better[wanted.metric]:
        yield (
            f"eval.mode '{wanted.mode}' would keep the worst {wanted.metric}; "
            f"set eval.mode: {better[wanted.metric]}"
        )
