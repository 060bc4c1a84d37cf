"""What `raytune-ft list` shows: every name with its parts and the memory that it needs.

Memory is `config.estimates.peak`'s figure for one GPU, from the card's shape and the recipe's
fields; a recipe is checked once and counted for every card.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.schema import Recipe

METHODS = ("qlora", "lora", "int8_lora", "full")
PRESET_FAMILY = "deepspeed"
SAMPLE_RECIPE = "qlora/oasst1_e3"
"""Its memory stands for a card that is shown on one line."""

_SUFFIXES = re.compile(r"(_e\d+|_example|_hf|_gpu8)+$")


@dataclass(frozen=True)
class Entry:
    """One listed name."""

    name: str
    family: str
    model: str | None
    """Model card; None for a preset."""
    recipe: str | None
    """`<method>/<data>`; None for a preset."""
    is_reference: bool
    """Whether XTuner v0.1.9 has this name."""

    @property
    def method(self) -> str:
        """`qlora`, `lora`, `int8_lora` or `full`; `preset` for DeepSpeed's."""
        return self.recipe.partition("/")[0] if self.recipe else "preset"

    @property
    def data(self) -> str:
        """The data sets, in the recipe's short words."""
        return _SUFFIXES.sub("", self.recipe.partition("/")[2]) if self.recipe else ""

    @property
    def memory(self) -> int | None:
        """Predicted bytes on each GPU; None for a preset."""
        return memory(self.model, self.recipe) if self.model and self.recipe else None


def entries(pattern: str | None = None, method: str | None = None) -> list[Entry]:
    """Return the names that contain `pattern`, in any case, by family, model and name."""
    wanted = (pattern or "").lower()
    found = [
        entry for entry in _all_entries() if wanted in entry.name and method in (None, entry.method)
    ]
    last = (len(catalog.families()), 0.0, "")
    return sorted(found, key=lambda e: (_place(e.model) if e.model else last, e.name))


def _all_entries() -> Iterator[Entry]:
    reference = set(catalog.reference_names())
    for model, recipe in catalog.pairs():
        name = catalog.compose(model, recipe)
        yield Entry(name, catalog.card(model).family, model, recipe, name in reference)
    for name in catalog.PRESETS:
        yield Entry(name, PRESET_FAMILY, None, None, True)


def models() -> list[str]:
    """Return the model cards by family and size."""
    return sorted(catalog.models(), key=_place)


def _place(model: str) -> tuple[int, float, str]:
    """Return what sorts a card: its family's place, its size, its name."""
    card = catalog.card(model)
    number, unit = float(card.size[:-1]), {"M": 1e6, "B": 1e9}[card.size[-1]]
    return list(catalog.families()).index(card.family), number * unit, model


def memory(model: str, recipe: str) -> int:
    """Return the predicted peak memory of a card with a recipe on a GPU, in bytes."""
    shape = catalog.card(model).config
    targets = catalog.lora_targets(model, recipe)
    known = _checked(recipe, targets if isinstance(targets, str) else tuple(targets))
    return sum(memory_bytes(known, count(shape, known), on_gpu=True).values())


@functools.cache
def _checked(recipe: str, targets: str | tuple[str, ...]) -> Recipe:
    """Return a recipe's fields under any model's name; memory depends on no other of a card's."""
    body = catalog.body_for(catalog.models()[0], recipe)
    lora = {**body.get("lora", {}), "targets": targets if isinstance(targets, str) else [*targets]}
    return Recipe.model_validate({**body, "lora": lora})
