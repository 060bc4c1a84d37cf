"""Identity: whether a checkpoint belongs to a recipe and its rows; what to do if it does not.

A run goes on exactly only with what decides its numbers: the fields of the recipe that are not
listed here, the packs of an optimizer step, and the rows.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.training.saving.checkpoint import TrainState

FREE_SECTIONS = ("run", "tune", "checkpoint", "chat_eval", "eval")
"""Sections that decide where a run happens and what it shows, and no number of its weights."""
FREE_FIELDS = (
    "model.gradient_checkpointing",
    "data.on_error",
    "data.cache",
    "data.sources.access",
    "train.layout",
    "train.micro_batch_size",
    "train.accumulation",
    "train.log_every",
    "train.loss_spike",
    "train.on_oom",
    "train.deepspeed",
)
"""Fields of the other sections that may change on resume. Micro-batch, accumulation and workers
may change if their product stays."""

ADDED_LATER: dict[str, object] = {
    "model.load_from": None,
    "model.new_tokens": [],
    "model.fast_path": "auto",
    "model.compute": "auto",
    "lora.init_lora_weights": True,
    "lora.loraplus_lr_ratio": None,
    "train.objective": "sft",
    "train.beta": 0.1,
    "train.neftune_noise_alpha": None,
}
"""Fields that earlier versions had not, and the value with which a run is as it was without them:
a run that they began can be taken up by this one."""


def new_state(recipe: Recipe, data_fingerprint: str) -> TrainState:
    """Make the state that a run begins with."""
    return TrainState(
        recipe_hash=recipe_hash(recipe),
        packs_per_step=recipe.global_batch_size,
        data_fingerprint=data_fingerprint,
    )


def recipe_hash(recipe: Recipe) -> str:
    """Hash what decides the numbers of a run, but for the packs per step."""
    return hashlib.sha256(json.dumps(_identity(recipe), sort_keys=True).encode()).hexdigest()


def _identity(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude=set(FREE_SECTIONS))
    for name in FREE_FIELDS:
        _remove(content, name.split("."))
    for name, before in ADDED_LATER.items():
        section, _, field = name.partition(".")
        if content[section][field] == before:
            del content[section][field]
    return content


def check(state: TrainState, recipe: Recipe, data_fingerprint: str, where: str) -> None:
    """Refuse a checkpoint with which this recipe cannot go on exactly.

    Args:
        state: of the checkpoint.
        recipe: to go on with.
        data_fingerprint: of its rows as they are now.
        where: the run, as a message begins with.

    Raises:
        CheckpointError: says what to do.
    """
    check_batch(state.packs_per_step, recipe, where)
    if state.recipe_hash != recipe_hash(recipe):
        raise CheckpointError(
            f"{where}: its checkpoint belongs to other values of model, lora, data or train; "
            "resume with the same recipe, or train under another run.name"
        )
    if state.data_fingerprint != data_fingerprint:
        paths = ", ".join(source.path for source in recipe.data.sources)
        raise CheckpointError(
            f"{where}: rows of {paths} have changed since this run began; put the files back as "
            "they were, or train under another run.name"
        )


def fitting(packs: int, workers: int, micro: int) -> tuple[int, int, int]:
    """Divide a step's packs: (workers, micro_batch_size, accumulation), whose product is `packs`.

    The first two are the largest that divide and are at most what is asked for.
    """
    workers = max(n for n in range(1, min(workers, packs) + 1) if packs % n == 0)
    share = packs // workers
    micro = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
    return workers, micro, share // micro


def check_batch(packs: int, recipe: Recipe, where: str) -> None:
    """Refuse a recipe whose optimizer step is not `packs` packs, as `check` does."""
    if packs == recipe.global_batch_size:
        return
    train, asked = recipe.train, recipe.run.workers
    workers, micro, accumulation = fitting(max(1, packs), asked, train.micro_batch_size)
    raise CheckpointError(
        f"{where}: an optimizer step of this run is {packs} packs, {asked} workers x "
        f"{train.micro_batch_size} x accumulation {train.accumulation} are "
        f"{recipe.global_batch_size}; set run.workers={workers} "
        f"train.micro_batch_size={micro} train.accumulation={accumulation}"
    )


def difference(recipe: Recipe, other: Recipe) -> tuple[str, object, object] | None:
    """Return the first field that decides numbers and differs, and its two values; None if none.

    Micro-batch, accumulation and workers are `check_batch`'s.
    """
    found = _first(_identity(recipe), _identity(other))
    return (found[0], _written(found[1]), _written(found[2])) if found else None


def _first(ours: Any, theirs: Any, name: str = "") -> tuple[str, object, object] | None:
    """Compare two contents field by field, in the recipe's order."""
    if ours == theirs:
        return None
    pairs: list[tuple[object, Any, Any]] = []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(key, ours.get(key), theirs.get(key)) for key in {**ours, **theirs}]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = list(zip(range(len(ours)), ours, theirs, strict=True))
    for key, one, another in pairs:
        if found := _first(one, another, f"{name}.{key}" if name else str(key)):
            return found
    return name, ours, theirs


def _written(value: object) -> str:
    """Write a value as a recipe does."""
    return value if isinstance(value, str) else json.dumps(value)


def check_field(field: str, where: str) -> None:
    """Refuse to change a field on resume that decides a run's numbers; RecipeError names it."""
    plain = ".".join(part for part in field.split(".") if not part.isdigit())
    if plain not in FREE_FIELDS and plain.partition(".")[0] not in FREE_SECTIONS:
        raise RecipeError(
            f"--resume {where}: '{field}' decides the run's numbers; leave it out, or train under "
            "another run.name"
        )


def _remove(content: Any, keys: list[str]) -> None:
    if isinstance(content, list):
        for entry in content:
            _remove(entry, keys)
    elif len(keys) == 1:
        del content[keys[0]]
    else:
        _remove(content[keys[0]], keys[1:])
