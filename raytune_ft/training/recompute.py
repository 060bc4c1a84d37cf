"""Recomputation, layer by layer: which decoder layers run again in the backward pass.

The first ones: what the layers behind them keep is gone by the time the backward pass reaches them
(`config.estimates.layout`). May be changed between steps: torch gives a layer that runs again the
random state that it had, so dropout draws the same, and a step's numbers stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the layers that can run again, from the first to the last."""
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


def recomputed(model: nn.Module) -> int:
    """Count the layers that run again."""
    return sum(one.gradient_checkpointing for one in decoder_layers(model))
