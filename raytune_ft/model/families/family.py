"""What a family has to say about its checkpoints: data, and two pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ft.model.families.layout import IDENTITY, Layout

ConfigJson = Mapping[str, Any]
"""Content of a config.json."""


class ContradictionError(ValueError):
    """A config.json whose fields say different things; the text is `field: what`."""


@dataclass(frozen=True)
class Demand:
    """A field of config.json that must be as the network computes; absent fields pass."""

    field: str
    advice: str
    """Why another value cannot be read, and what to do."""
    allowed: tuple[Any, ...] | None = None
    """The only values; None: any but the forbidden."""
    forbidden: tuple[Any, ...] = ()

    def problem(self, config: ConfigJson) -> str | None:
        """Return what is wrong, None if nothing is."""
        if self.field not in config:
            return None
        value = config[self.field]
        fine = value not in self.forbidden and (self.allowed is None or value in self.allowed)
        return None if fine else f"{self.field} is {value!r}: {self.advice}"


@dataclass(frozen=True)
class Family:
    """How to read one kind of checkpoint with a network that transformers ships."""

    name: str
    matches: Callable[[ConfigJson], bool]
    """Is this config.json ours; ContradictionError if its fields disagree."""
    translate: Callable[[ConfigJson], Any]
    """config.json -> a PreTrainedConfig; a pure function."""
    network: Callable[[Any], Any]
    """The PreTrainedConfig -> its model class, whose name mapping is registered by then."""
    layout: Layout = IDENTITY
    demands: tuple[Demand, ...] = ()
    spare_keys: tuple[str, ...] = ()
    """Endings of tensor names in the files that the network does not need."""
    normalised_head: bool = False
    """The network divides each row of the head by its length (Baichuan2's NormHead)."""
    no_native_form: str = ""
    """Why the model cannot be written in a layout that transformers reads; empty: it can."""

    def is_spare(self, name: str) -> bool:
        """Tell whether a tensor of the files is one that the network does not need."""
        # whole words: `attn.bias` is a buffer, `c_attn.bias` a weight
        return f".{name}".endswith(tuple(f".{end}" for end in self.spare_keys))

    def problems(self, config: ConfigJson) -> Iterator[str]:
        """Yield `field is value: advice` for each field that the network cannot follow."""
        for demand in self.demands:
            problem = demand.problem(config)
            if problem is not None:
                yield problem


def read(config: ConfigJson, **names: tuple[Any, ...]) -> dict[str, Any]:
    """Translate fields: `ours=(default, their name, an older name ...)`; the first present."""
    return {
        ours: next((config[name] for name in theirs if name in config), default)
        for ours, (default, *theirs) in names.items()
    }


def stored_dtype(config: ConfigJson, default: str) -> str:
    """Return the type of the weights in the files."""
    return str(config.get("dtype") or config.get("torch_dtype") or default)
