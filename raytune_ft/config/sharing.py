"""Sharing: which recipes can be trained side by side on one frozen base, and why others cannot.

Adapters share a base if they see the same rows in the same order through the same network, and if
nothing but their own low-rank updates is theirs.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.config.schema import Recipe

OWN = (
    "lora.r", "lora.alpha", "lora.dropout", "lora.use_rslora", "lora.init_lora_weights",
    "lora.loraplus_lr_ratio", "train.lr", "train.betas", "train.weight_decay", "train.max_norm",
    "train.scheduler", "train.warmup_ratio", "train.warmup_steps", "train.min_lr",
    "train.optimizer", "train.loss_spike", "run.name",
)  # fmt: skip
"""Fields in which recipes on one base may differ."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""Beginnings that neither change the base nor look at it or at rows."""


def refusal(recipe: Recipe) -> str | None:
    """Return why adapters of a recipe cannot share a base, in one line; None if they can."""
    model, lora, train = recipe.model, recipe.lora, recipe.train
    odd = [
        ("model.method", "full", model.method == "full"),
        ("model.load_from", model.load_from, model.load_from is not None),
        ("model.new_tokens", model.new_tokens, bool(model.new_tokens)),
        ("lora.use_dora", True, lora.use_dora),
        ("lora.bias", lora.bias, lora.bias != "none"),
        ("lora.modules_to_save", lora.modules_to_save, bool(lora.modules_to_save)),
        (
            "lora.init_lora_weights",
            lora.init_lora_weights,
            lora.init_lora_weights not in PLAIN_INITS,
        ),
        ("train.objective", train.objective, train.objective != "sft"),
        (
            "train.neftune_noise_alpha",
            train.neftune_noise_alpha,
            train.neftune_noise_alpha is not None,
        ),
        ("train.deepspeed", train.deepspeed, train.deepspeed.startswith("zero3")),
        ("run.workers", recipe.run.workers, recipe.run.workers > 1),
    ]
    found = next(((field, value) for field, value, is_odd in odd if is_odd), None)
    return None if found is None else f"{found[0]} {found[1]!r}: its trials cannot share a base"


def difference(recipe: Recipe, other: Recipe) -> str | None:
    """Return the first field for which two recipes cannot share a base; None if they can."""
    mine, theirs = _common(recipe), _common(other)
    return next((field for field in mine if mine[field] != theirs[field]), None)


def _common(recipe: Recipe) -> dict[str, Any]:
    """Return by dotted name what recipes on one base have in common."""
    content = recipe.model_dump(mode="json", exclude={"tune"})
    flat = {f"{s}.{k}": value for s, fields in content.items() for k, value in fields.items()}
    return {field: value for field, value in flat.items() if field not in OWN}
