"""Linear layers with and without a low-rank update: several on one input in one step.

A layer takes part if its base is frozen and its update, if any, is PEFT's plain one. Whatever
changes later (adapters switched off, merged or swapped, hooks) is looked at in each call.

Shapes: x (..., in), outputs (..., out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytune_ft.kernels.launch import multiplies_in_triton
from raytune_ft.kernels.linear import Base, Lora, adapted
from raytune_ft.kernels.sliced import sliced
from raytune_ft.model.fastpath.lane import LANE
from raytune_ft.model.stacked import StackedLora

PART = "fast_part"
"""Attribute of a layer that takes part."""
OLD_GPU = "{} on a GPU before Ampere"
PLAIN_LORA = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")
"""PEFT's classes whose update is B A alone."""


@dataclass(frozen=True)
class Part:
    """What `adapted` needs to know of a layer."""

    base: Base
    own: Base
    """The same weight, never in float8."""
    adapter: str | None
    """Name of its update; None: it has none."""
    dtype: torch.dtype
    """Of its inputs and outputs."""
    stream: int = 0
    """Tells its dropout from that of other layers under one seed."""

    def base_of(self, layer: Any) -> Base:
        """Return the frozen weight as it is multiplied now: in float8 while training alone."""
        in_own_type = self.base.eighths is not None and not layer.training
        return self.own if in_own_type else self.base

    def lora(self, layer: Any) -> Lora | None:
        """Return the update as it is now."""
        if self.adapter is None:
            return None
        dropout = layer.lora_dropout[self.adapter]
        return Lora(
            layer.lora_A[self.adapter].weight,
            layer.lora_B[self.adapter].weight,
            layer.scaling[self.adapter],
            getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        )

    def fits(self, layer: Any, x: torch.Tensor) -> bool:
        """Tell whether the layer, now, on `x`, does nothing else than base and update."""
        if isinstance(layer, StackedLora):
            return all(self.fits(member, x) for member in layer.members)
        if x.dtype is not self.dtype or self.base.module.weight.requires_grad:
            return False
        if layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if self.adapter is None:
            return True
        return (
            not layer.disable_adapters
            and not layer.merged
            and list(layer.active_adapters) == [self.adapter]
        )


class FastLora:
    """Form of a PEFT layer that stands alone."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output; anything but `x` goes PEFT's way."""
        part: Part = getattr(self, PART)
        if args or kwargs or not LANE.is_fast or not part.fits(self, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return _adapted(x, [part], [self])[0]


def outputs(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of layers on the same input, together where all of them take part."""
    parts: list[Part | None] = [layer.__dict__.get(PART) for layer in layers]
    fitting = [
        part
        for layer, part in zip(layers, parts, strict=True)
        if part is not None and part.fits(layer, x)
    ]
    if len(fitting) < len(layers):
        return [layer(x) for layer in layers]
    return _adapted(x, fitting, layers)


def _adapted(
    x: torch.Tensor, parts: Sequence[Part], layers: Sequence[nn.Module]
) -> list[torch.Tensor]:
    bases = [part.base_of(layer) for part, layer in zip(parts, layers, strict=True)]
    # one seed for all layers of a batch: to draw one is a launch
    seed = LANE.packed.seed if LANE.packed is not None else None
    trials = max(len(_members(layer)) for layer in layers)
    loras = [
        [part.lora(_members(layer)[trial % len(_members(layer))])
         for part, layer in zip(parts, layers, strict=True)]
        for trial in range(trials)
    ]  # fmt: skip
    if trials > 1:
        return sliced(x, bases, loras, seed, parts[0].stream)
    return adapted(x, list(zip(bases, loras[0], strict=True)), seed, parts[0].stream)


def _members(layer: Any) -> Sequence[Any]:
    """Return the layers of one adapter each that a layer stands for: itself, as a rule."""
    return list(layer.members) if isinstance(layer, StackedLora) else (layer,)


def is_lora(layer: Any) -> bool:
    """Tell whether a layer is one of PEFT's, with an update."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def refusal(layer: Any) -> str | None:
    """Return why a linear layer cannot take part; None if it can."""
    if is_lora(layer):
        return _base_refusal(layer.base_layer) or _lora_refusal(layer)
    return _base_refusal(layer)


def part_of(layer: Any, *, resident: bool, stream: int) -> Part:
    """Return what `adapted` needs of a layer without a `refusal`.

    Args:
        layer: the layer.
        resident: keep its NF4 weights unpacked beside the packed ones, instead of unpacking them
            at each use.
        stream: a number of its own; those of one input follow each other.
    """
    linear = layer.base_layer if is_lora(layer) else layer
    adapter = layer.active_adapters[0] if is_lora(layer) else None
    base = Base(linear)
    if resident:
        base.resident()
    return Part(base, Base(linear), adapter, _compute_dtype(linear), stream)


def has_dropout(layer: Any) -> bool:
    """Tell whether a layer has an update that drops some of its input in training."""
    dropouts = layer.lora_dropout.values() if is_lora(layer) else ()
    return any(getattr(dropout, "p", 0.0) for dropout in dropouts)


def _lora_refusal(layer: Any) -> str | None:
    if len(layer.active_adapters) != 1 or len(layer.lora_A) != 1:
        return f"{len(layer.lora_A)} adapters"
    if layer.disable_adapters or layer.merged:
        return "its adapter is switched off or merged"
    name = layer.active_adapters[0]
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        return "DoRA" if "Dora" in variant else variant
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind not in PLAIN_LORA:
        return f"{type(layer).__name__} of {type(layer).__module__}"
    weight = layer.lora_A[name].weight
    if has_dropout(layer) and not multiplies_in_triton(weight.device):
        return OLD_GPU.format("dropout")
    return None if layer.lora_B[name].bias is None else "the update has a bias"


def _base_refusal(linear: Any) -> str | None:
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "trained in full" if linear.weight.requires_grad else "its bias is trained"
    if type(linear) is nn.Linear:
        return _dtype_refusal(linear.weight.dtype)
    state = getattr(getattr(linear, "weight", None), "quant_state", None)
    if state is None:
        return "int8 base" if "8bit" in type(linear).__name__ else type(linear).__name__
    if state.quant_type != "nf4":
        return f"{state.quant_type} base"
    return _dtype_refusal(_compute_dtype(linear))


def _dtype_refusal(dtype: torch.dtype) -> str | None:
    fine = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return None if fine else f"{str(dtype).removeprefix('torch.')} weights"


def _compute_dtype(linear: Any) -> torch.dtype:
    found: torch.dtype | None = getattr(linear, "compute_dtype", None)
    weight: torch.Tensor = linear.weight
    return weight.dtype if found is None else found
