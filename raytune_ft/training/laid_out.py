"""A model laid out: which decoder layers run again in the backward pass, what stays unpacked.

The first layers run again: what those behind them keep is gone by the time the backward pass
reaches them (`config.estimates.layout`). What these layers keep, the embedding and the output head
may lie on the host. All of it may change between steps: torch gives a layer that
runs again the random state that it had, so dropout draws the same, and a step's numbers stay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ft.config.estimates.layout import Layout
from raytune_ft.config.estimates.setting import INPUTS
from raytune_ft.model import hosting
from raytune_ft.model.fastpath.linears import PART
from raytune_ft.model.host_inputs import Shelf

PLAIN = partial(checkpoint, use_reentrant=False)
"""What transformers sets for recomputation."""


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the layers that can run again, from the first to the last."""
    # transformers takes seconds to import, and the driver imports this as well
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def recompute(model: Any, layers: int, *, away: bool = False) -> None:
    """Let the first `layers` decoder layers run again in the backward pass, and no other.

    Args:
        model: of transformers, wrapped by peft or not.
        layers: 0 to as many as there are.
        away: keep the inputs of these layers on the host in between.
    """
    found = decoder_layers(model)
    if layers and not any(hasattr(one, "_gradient_checkpointing_func") for one in found):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shelf = Shelf()
    for number, layer in enumerate(found):
        layer.gradient_checkpointing = number < layers
        if number < layers:
            way = partial(shelf.checkpoint, stays=number == layers - 1) if away else PLAIN
            layer._gradient_checkpointing_func = way


def lay_out(model: Any, layout: Layout) -> list[str]:
    """Let a model that was built in another layout go on in this one.

    Returns:
        A line for what stays on the device though it was to leave it.
    """
    layers = decoder_layers(model)
    recompute(model, layout.recomputed, away=INPUTS in layout.hosted)
    lines = hosting.place(model, layout.hosted, next(layers[0].parameters()).device)
    for module in model.modules():
        part = module.__dict__.get(PART)
        if part is not None and not layout.resident:
            part.base.streamed()
    return lines
