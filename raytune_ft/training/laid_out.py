"""A model laid out: which decoder layers run again in the backward pass, what stays unpacked.

The first layers run again: what those behind them keep is gone by the time the backward pass
reaches them (`config.estimates.layout`). Both may change between steps: torch gives a layer that
runs again the random state that it had, so dropout draws the same, and a step's numbers stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from raytune_ft.config.estimates.layout import Layout
from raytune_ft.model.fastpath.linears import PART


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the layers that can run again, from the first to the last."""
    # transformers takes seconds to import, and the driver imports this as well
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def recompute(model: Any, layers: int) -> None:
    """Let the first `layers` decoder layers run again in the backward pass, and no other.

    Args:
        model: of transformers, wrapped by peft or not.
        layers: 0 to as many as there are.
    """
    found = decoder_layers(model)
    if layers and not any(hasattr(one, "_gradient_checkpointing_func") for one in found):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for number, layer in enumerate(found):
        layer.gradient_checkpointing = number < layers


def lay_out(model: Any, layout: Layout) -> None:
    """Let a model that was built in another layout go on in this one."""
    recompute(model, layout.recomputed)
    for module in model.modules():
        part = module.__dict__.get(PART)
        if part is not None and not layout.resident:
            part.base.streamed()
