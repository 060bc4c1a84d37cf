"""Preference training of other programs becomes `train.objective`: their settings in, ours out.

There a length is that of one answer with its question, here `data.max_length` is that of the pair.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.errors import RecipeError
from raytune_ft.importers.draft import Keys

OBJECTIVES = ("dpo", "orpo")
LOSSES = {"sigmoid": "dpo", "orpo": "orpo"}
"""Losses of a DPO trainer that are trained here -> the objective."""
XTUNER_MAPS = ("orpo_dpo_mix_40k_map_fn", "intel_orca_dpo_map_fn")
"""XTuner's map functions of preference rows, whose columns are recognised."""
REFERENCE = "the model that a run begins with is the reference"


def set_objective(keys: Keys, objective: str, key: str, beta: str, default: float = 0.1) -> None:
    """Set the objective, which `key` told, and its strength, which `beta` tells."""
    draft = keys.draft
    draft.set("train.objective", objective, keys.line_of(key))
    draft.set("train.beta", keys.number(beta, default), keys.line_of(beta))


def objective_of(keys: Keys, key: str) -> str:
    """Return the objective of a DPO trainer's loss; RecipeError for one that is not trained."""
    loss = keys.plain(key, "sigmoid")
    found = LOSSES.get(loss) if isinstance(loss, str) else None
    if found is None:
        raise not_trained(keys, key, loss)
    return found


def not_trained(keys: Keys, key: str, value: Any) -> RecipeError:
    """Return the error of an objective that there is not."""
    line = keys.line_of(key)
    return keys.draft.refuse(line, f"{key} {value} is not trained here", "sft, dpo and orpo are")


def set_length(keys: Keys, key: str, default: int) -> None:
    """Give a pair the room of two answers."""
    length = keys.number(key, default)
    keys.draft.set("data.max_length", 2 * length, keys.line_of(key))
    keys.note(
        key, f"{key} {length} is the length of one answer there",
        f"data.max_length is {2 * length}, that of a pair",
    )  # fmt: skip
