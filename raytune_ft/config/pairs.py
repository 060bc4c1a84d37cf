"""Pairs: settings that do not work together, in one table; a recipe in, what to use instead out.

What is refused here is refused before anything loads. What depends on the model's files or on the
machine is checked in `survey`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raytune_ft.config.zero import PRESETS, asked, unsharded

if TYPE_CHECKING:
    from raytune_ft.config.schema import Recipe


def problem(recipe: Recipe) -> str | None:
    """Return the first pair that does not work, named with what to use instead; None if all do."""
    return next(_problems(recipe), None)


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _of_method(recipe)
    yield from _of_compute(recipe)
    yield from _of_adapter(recipe)
    yield from _of_optimizer(recipe)
    yield from _of_objective(recipe)
    yield from _of_evaluation(recipe)
    yield from _of_workers(recipe)


def _of_method(recipe: Recipe) -> Iterator[str]:
    model, zero = recipe.model, recipe.train.deepspeed
    stage, _ = asked(zero)
    if model.quantization != "none" and model.method == "full":
        yield (
            f"model.method 'full' cannot train {model.quantization} weights; "
            "set model.quantization: none, or model.method: lora"
        )
    if model.quantization != "none" and stage == 3:
        yield f"train.deepspeed '{zero}' cannot shard {model.quantization} weights; use zero2"
    if recipe.train.min_lr > recipe.train.lr:
        yield "train.min_lr is above train.lr; lower train.min_lr"


def _of_compute(recipe: Recipe) -> Iterator[str]:
    """Yield what would leave `fp8` without a product: it is the fast path's, of frozen weights."""
    model, zero = recipe.model, recipe.train.deepspeed
    if model.compute == "auto":
        return
    what = f"model.compute '{model.compute}'"
    if model.method == "full":
        yield (
            f"{what} multiplies frozen weights, and model.method 'full' trains them all; leave it "
            "out, or set model.method: lora"
        )
    if model.fast_path is False:
        yield f"{what} is a way of the fast path; leave model.fast_path out, or model.compute"
    if model.quantization == "int8":
        yield f"{what} does not multiply int8 weights; set model.quantization: nf4, or none"
    if model.dtype == "float16":
        yield f"{what} goes with model.dtype bfloat16 or float32, not float16; use auto"
    if recipe.lora.use_dora:
        yield f"{what} has no form of lora.use_dora, which is not on the fast path; leave one out"
    if asked(zero)[0] == 3:
        yield f"train.deepspeed '{zero}' parts the weights that {what} multiplies; use zero2"


def _of_adapter(recipe: Recipe) -> Iterator[str]:
    model, lora, zero = recipe.model, recipe.lora, recipe.train.deepspeed
    twice = sorted({text for text in model.new_tokens if model.new_tokens.count(text) > 1})
    if twice:
        yield f"model.new_tokens has '{twice[0]}' twice; leave one out"
    if any(not text.strip() for text in model.new_tokens):
        yield "model.new_tokens has a token of blanks; leave it out"
    if model.method == "full":
        return
    init = str(lora.init_lora_weights)
    if init.startswith(("pissa", "olora")) and model.quantization != "none":
        yield (
            f"lora.init_lora_weights '{init}' moves weights out of the base, and what is left "
            f"would be quantised anew: no adapter would fit the base itself; "
            f"{'use loftq' if model.quantization == 'nf4' else 'leave it out'}, or set "
            "model.quantization: none"
        )
    if init == "loftq" and model.quantization != "nf4":
        yield (
            "lora.init_lora_weights 'loftq' makes up for what NF4 loses; set model.quantization: "
            "nf4, or use pissa"
        )
    if init == "orthogonal" and lora.r % 2:
        yield f"lora.init_lora_weights 'orthogonal' needs an even lora.r; use {lora.r + 1}"
    if model.load_from is not None and init.startswith(("pissa", "olora", "loftq", "eva")):
        yield (
            f"lora.init_lora_weights '{init}' is how a new adapter begins, and model.load_from "
            "gives one that has begun; leave one of them out"
        )
    swept = next((name for name in recipe.tune.space if name.startswith("lora.")), None)
    if model.load_from is not None and swept is not None:
        yield f"tune.space '{swept}': model.load_from gives the adapter as it is; leave it out"
    if asked(zero)[0] == 3:
        for name, given in (
            ("lora.use_dora", lora.use_dora),
            ("model.new_tokens", model.new_tokens),
        ):
            if given:
                yield f"train.deepspeed '{zero}' shards the weights that {name} reads; use zero2"


def _of_optimizer(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    stage, offloaded = asked(train.deepspeed)
    if stage and (found := unsharded(train.optimizer)):
        yield f"train.deepspeed '{train.deepspeed}' {found}"
    if offloaded and train.optimizer not in ("adamw", "paged_adamw_32bit"):
        yield (
            f"train.deepspeed '{train.deepspeed}' steps weights on the host, and train.optimizer "
            f"'{train.optimizer}' is for GPUs; use adamw, or zero{stage}"
        )
    if train.neftune_noise_alpha is not None and train.objective != "sft":
        yield (
            f"train.neftune_noise_alpha would make train.objective '{train.objective}' compare "
            "answers to shaken questions; leave it out, or set train.objective: sft"
        )


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
    if objective == "dpo" and asked(recipe.train.deepspeed)[0] == 3:
        yield (
            f"train.deepspeed '{recipe.train.deepspeed}' shards the weights that train.objective "
            "'dpo' compares with those of the start; use zero2, or train.objective: orpo"
        )


def measured(recipe: Recipe) -> dict[str, str]:
    """Return what is measured on held-out rows, each with its good end, `min` or `max`."""
    better = {"val_loss": "min", "val_perplexity": "min"}
    if recipe.train.objective != "sft":
        better = {"val_loss": "min", "val_rewards_accuracy": "max", "val_rewards_margin": "max"}
    return better | {f"val_{name}": "max" for name in recipe.eval.metrics}


def _of_evaluation(recipe: Recipe) -> Iterator[str]:
    wanted = recipe.eval
    needs_rows = {
        "eval.patience": wanted.patience is not None,
        "eval.export: best": wanted.export == "best",
        "eval.metrics": bool(wanted.metrics),
    }
    for name, given in needs_rows.items():
        if given and recipe.data.validation is None:
            yield f"{name} needs held-out rows; set data.validation, such as 0.1"
    preference = recipe.train.objective != "sft"
    if preference and wanted.metrics:
        yield (
            "eval.metrics compare an answer with a row's own, and preference rows have two; "
            "set eval.metrics: [], or train.objective: sft"
        )
    better = measured(recipe)
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


def _of_workers(recipe: Recipe) -> Iterator[str]:
    run, zero = recipe.run, recipe.train.deepspeed
    if run.min_workers is None:
        return
    if run.min_workers > run.workers:
        yield (
            f"run.min_workers {run.min_workers} is above run.workers {run.workers}; "
            "lower run.min_workers"
        )
    if zero not in (*PRESETS, "none"):
        yield (
            f"run.min_workers changes the numbers that the file '{zero}' of train.deepspeed holds; "
            "use a preset such as zero2, or leave run.min_workers out"
        )
