"""Proposals: a recipe and the memory of a GPU in, the fastest settings that fit out. No torch.

Searched are how the frozen base is stored, where the optimizer's averages are kept and what
DeepSpeed spreads or offloads, each with its fastest layout: what a step learns stays the same, up
to the precision of storage. If nothing fits, LoRA instead of full training is searched; then
shorter packs, which change the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from raytune_ft.config.estimates import layout
from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.layout import Layout
from raytune_ft.config.estimates.pace import Device
from raytune_ft.config.pairs import problem
from raytune_ft.config.schema import Recipe

FILLED = 0.97
"""Share of a GPU's memory that is planned for: torch's blocks leave gaps."""
SHORTEST = 256
"""Tokens; packs are not proposed to be shorter."""
PACKS = 1000.0
"""Packs of an epoch where they are not known: the order of proposals hardly depends on them."""

CountsOf = Callable[[Recipe], Counts]


@dataclass(frozen=True)
class Proposal:
    """Settings with what they take."""

    recipe: Recipe
    overrides: tuple[str, ...]
    """What differs from the recipe that was asked about, as `section.field=value`."""
    layout: Layout
    layers: int
    """Decoder layers of the model."""
    memory: int
    """Peak of one worker, in bytes."""
    seconds: float
    """Of an epoch."""

    @property
    def line(self) -> str:
        """The overrides as they are typed."""
        return " ".join(self.overrides)


def proposals(
    recipe: Recipe, counts_of: CountsOf, available: int, device: Device, packs: float | None = None
) -> list[Proposal]:
    """Return settings that fit, the fastest first; the fastest of equals with the fewest changes.

    Args:
        recipe: as it is asked for.
        counts_of: counts a changed recipe's parameters.
        available: bytes of each GPU.
        device: whose rates decide what is fast.
        packs: of an epoch.
    """
    for space in (kept_method, other_method, shorter_packs):
        found = [
            one
            for one in (
                weighed(recipe, r, counts_of, available, device, packs) for r in space(recipe)
            )
            if one.memory <= available * FILLED
        ]
        if found:
            return sorted(found, key=lambda one: (one.seconds, len(one.overrides), one.overrides))
    return []


def weighed(
    asked: Recipe,
    recipe: Recipe,
    counts_of: CountsOf,
    available: int,
    device: Device,
    packs: float | None,
) -> Proposal:
    """Return a changed recipe in its layout, with what it takes."""
    counts = counts_of(recipe)
    known = PACKS if packs is None else packs * asked.data.max_length / recipe.data.max_length
    if recipe.train.layout == "auto":
        chosen = layout.choose(recipe, counts, available, device)
        fixed, memory, seconds = chosen.layout, chosen.memory, chosen.seconds
    else:
        fixed = layout.own_layout(recipe, counts.layers)
        own = layout.weigh(recipe, counts, device, fixed)
        memory, seconds = own.memory, own.seconds
    steps = known / recipe.global_batch_size
    overrides = tuple(differences(asked, recipe))
    return Proposal(recipe, overrides, fixed, counts.layers, memory, steps * seconds)


def alternatives(found: list[Proposal], number: int) -> list[Proposal]:
    """Return the fastest of each way to store the base and to spread state."""
    kinds: dict[tuple[Any, ...], Proposal] = {}
    for one in found:
        model, train = one.recipe.model, one.recipe.train
        kinds.setdefault((model.quantization, train.layout, train.deepspeed), one)
    return list(kinds.values())[:number]


def kept_method(recipe: Recipe) -> Iterator[Recipe]:
    """Yield all settings with the recipe's method and length; layouts are chosen for each."""
    model, train = recipe.model, recipe.train
    stores = ["none"] if model.method == "full" else ["none", "int8", "nf4"]
    for way, stored, optimizer, zero in product(
        dict.fromkeys([train.layout, "auto"]),
        stores,
        _optimizers(train.optimizer),
        _presets(recipe),
    ):
        changed = _with(
            recipe,
            model={"quantization": stored},
            train={"layout": way, "optimizer": optimizer, "deepspeed": zero},
        )
        if problem(changed) is None:
            yield changed


def other_method(recipe: Recipe) -> Iterator[Recipe]:
    """Yield all settings with an adapter instead of full training."""
    if recipe.model.method == "full":
        yield from kept_method(_with(recipe, model={"method": "lora"}))


def shorter_packs(recipe: Recipe) -> Iterator[Recipe]:
    """Yield all settings with packs of a half, a quarter and so on, as long as none fits longer."""
    length = recipe.data.max_length // 2
    while length >= SHORTEST:
        shorter = _with(recipe, data={"max_length": length})
        yield from kept_method(shorter)
        yield from other_method(shorter)
        length //= 2


def differences(asked: Recipe, changed: Recipe) -> Iterator[str]:
    """Yield what was changed, as overrides."""
    for section in ("model", "data", "train"):
        before, after = getattr(asked, section), getattr(changed, section)
        for field in type(before).model_fields:
            value = getattr(after, field)
            if value != getattr(before, field):
                said = str(value).lower() if isinstance(value, bool) else value
                yield f"{section}.{field}={said}"


def _optimizers(own: str) -> list[str]:
    if own in ("lion", "muon"):
        return [own]  # another optimizer would be another run
    return list(dict.fromkeys([own, "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"]))


def _presets(recipe: Recipe) -> list[str]:
    """Return what DeepSpeed may be told; `none` sums over workers all the same."""
    own = recipe.train.deepspeed
    spread = ["zero2", "zero3", "zero3_offload"] if recipe.run.workers > 1 else []
    return list(dict.fromkeys([own, "none", *spread, "zero2_offload"]))


def _with(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe with other values, which are not checked anew."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )
