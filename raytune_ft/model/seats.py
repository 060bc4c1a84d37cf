"""Seats: several adapters on one frozen model; in its layers sit one of them, or some side by side.

In: a loaded model and LoRA sections. Out: for each a PEFT model of its own, all around the same
base. PEFT's layers of an adapter take their places in the model by turns; a `stacked.StackedLora`
holds several at once, of which each sees its own rows of a batch. What sits elsewhere costs its
own weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from raytune_ft.config.schema import LoraSection
from raytune_ft.model import adapter
from raytune_ft.model.fastpath import linears
from raytune_ft.model.fastpath.lane import turn_into
from raytune_ft.model.stacked import StackedLora


class Seats:
    """The places of a model in which adapters' layers sit, all of the same targets."""

    def __init__(self, model: Any) -> None:
        """Take a frozen model as `loading.load_model` gave it."""
        self.model = model
        self.wrapped: dict[int, Any] = {}
        """PEFT's model of each adapter, by the adapter's number."""
        self._layers: dict[int, dict[str, nn.Module]] = {}
        self._parents: dict[str, tuple[nn.Module, str]] = {}
        self._stacked: dict[tuple[int, ...], dict[str, nn.Module]] = {}
        self._now: tuple[int, ...] = ()

    def add(self, number: int, lora: LoraSection, seed: int) -> None:
        """Make an adapter as `adapter.attach` does for a model of its own, and let it sit."""
        self._leave()
        wrapped = adapter.attach(self.model, lora, seed)
        # PEFT notes the last configuration there, and would warn of a second one
        del self.model.peft_config
        found = {
            name: module for name, module in self.model.named_modules() if linears.is_lora(module)
        }
        for name in found:
            parent, _, child = name.rpartition(".")
            self._parents.setdefault(name, (self.model.get_submodule(parent), child))
        self.wrapped[number], self._layers[number], self._now = wrapped, found, (number,)

    def remove(self, number: int) -> None:
        """Forget an adapter; its memory is free when nobody else holds its weights."""
        if number in self._now:
            self._leave()
        del self.wrapped[number], self._layers[number]
        self._stacked = {who: made for who, made in self._stacked.items() if number not in who}

    def sit(self, *numbers: int) -> None:
        """Let one adapter compute, as if it were the only one, or several side by side.

        Several share a batch: dimension 0 of what layers get is divided among them equally, in
        this order.
        """
        if numbers == self._now:
            return
        if len(numbers) > 1 and numbers not in self._stacked:
            self._stacked[numbers] = self._stack(numbers)
        self._put(self._layers[numbers[0]] if len(numbers) == 1 else self._stacked[numbers])
        self._now = numbers

    def dress(self, example: int) -> None:
        """Give all adapters' layers the fast form that `fast.install` gave those of one."""
        for number, layers in self._layers.items():
            for name, layer in layers.items():
                if number != example:
                    _dress(layer, self._layers[example][name])

    def _stack(self, numbers: Sequence[int]) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        for name, first in self._layers[numbers[0]].items():
            made[name] = StackedLora([self._layers[number][name] for number in numbers])
            _dress(made[name], first)
        return made

    def _leave(self) -> None:
        if self._now:
            any_of_them = self._layers[self._now[0]]
            self._put({name: layer.base_layer for name, layer in any_of_them.items()})  # type: ignore[misc]
            self._now = ()

    def _put(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, child = self._parents[name]
            parent._modules[child] = layer


def _dress(layer: nn.Module, like: nn.Module) -> None:
    part = like.__dict__.get(linears.PART)
    if part is not None:
        setattr(layer, linears.PART, part)
        turn_into(layer, linears.FastLora)
