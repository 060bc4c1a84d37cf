"""Layout of a group: how many rows and how many adapters go through the base in one pass.

The planner says how many rows of a single trial a pass has room and use for. The adapters share
them: k of them with n / k packs each keep what one keeps with n. Beside that, each has its own
weights, gradients and averages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.layout import (
    FILLED,
    Layout,
    fastest,
    layouts,
    own_layout,
    smallest,
    weigh,
)
from raytune_ft.config.estimates.pace import DEVICES, Device, device_called
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.estimates.setting import LONG
from raytune_ft.config.schema import Recipe
from raytune_ft.model.memory import Shape
from raytune_ft.training.layouts import least_memory


@dataclass(frozen=True)
class Plan:
    """How a group's passes are."""

    recipes: list[Recipe]
    """With sizes and recomputation that hold for all of them."""
    at_once: int
    """Adapters in one pass."""
    resident: bool = False
    """Whether NF4 weights stay unpacked."""


def planned(
    recipes: Sequence[Recipe],
    model_folder: Path,
    device: torch.device,
    share: float = 1.0,
    at_once: int | None = None,
) -> Plan:
    """Plan the passes of recipes that share a base.

    Args:
        recipes: of the trials.
        model_folder: with config.json.
        device: of this process.
        share: of the device's memory, that this process may use.
        at_once: adapters in one pass, with the recipes' own sizes; None: what fits.
    """
    if device.type != "cuda" or at_once is not None:
        return Plan([_fixed(one) for one in recipes], at_once or len(recipes))
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    shape, (free, _) = Shape(config), least_memory(device, share)
    rates = device_called(torch.cuda.get_device_name(device)) or DEVICES["h200"]
    return chosen([(one, shape.counts(one)) for one in recipes], free, rates)


def chosen(trials: Sequence[tuple[Recipe, Counts]], free: int, rates: Device) -> Plan:
    """Return the plan of a group on a GPU with so many free bytes; nothing lies on the host.

    Args:
        trials: recipes with the counts of their model.
        free: bytes.
        rates: of the GPU.
    """
    recipe, counts = max(trials, key=lambda trial: trial[1].trained)
    recipe = _fixed(recipe)
    beside = sum(adapter_bytes(_fixed(one), of_it) for one, of_it in trials)
    limit = free * FILLED - (beside - adapter_bytes(recipe, counts))
    if recipe.train.layout == "recipe":
        found = [weigh(recipe, counts, rates, own_layout(recipe, counts.layers))]
    else:
        found = [weigh(recipe, counts, rates, one) for one in layouts(recipe, counts)]
    rows = (fastest(found, limit) or smallest(found)).layout
    at_once, micro = divided(rows, len(trials), recipe)
    own = {"micro_batch_size": micro, "accumulation": _packs(recipe) // micro}
    recipes = []
    for one, _ in trials:
        laid = rows.applied(_fixed(one), counts.layers)
        recipes.append(laid.model_copy(update={"train": laid.train.model_copy(update=own)}))
    return Plan(recipes, at_once, rows.resident)


def divided(rows: Layout, adapters: int, recipe: Recipe) -> tuple[int, int]:
    """Divide the packs of a pass: adapters in it, and packs of each."""
    most = rows.micro_batch_size
    # beyond, the fast path takes an MLP's tokens in parts, and the parts of a trial are its own
    most = max(1, min(most, LONG // recipe.data.max_length))
    if recipe.train.layout == "recipe":
        return max(1, min(adapters, most)), rows.micro_batch_size
    at_once, packs = min(adapters, most), _packs(recipe)
    micro = max(n for n in range(1, packs + 1) if packs % n == 0 and n * at_once <= most)
    return at_once, micro


def adapter_bytes(recipe: Recipe, counts: Counts) -> int:
    """Return what an adapter takes on a GPU: weights, gradients and averages."""
    parts = memory_bytes(recipe, counts, on_gpu=True)
    without = memory_bytes(recipe, replace(counts, trained=0), on_gpu=True)
    return sum(parts.values()) - sum(without.values())


def _packs(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.train.accumulation


def _fixed(recipe: Recipe) -> Recipe:
    """Return the recipe as a group runs it: with torch's own engine, and stopped by full memory.

    A step that does not fit is first tried with fewer adapters in a pass, and then ends its trial.
    """
    train = {"deepspeed": "none", "on_oom": "stop"}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
