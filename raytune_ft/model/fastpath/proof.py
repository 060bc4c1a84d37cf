"""Proof: a model with fast forms in; the layers whose fast form computes something else out.

A table of class names may be right for one release of transformers and wrong for the next. So one
layer of each make is computed both ways before a run, on two rows of a few segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from raytune_ft.model.fastpath.attention import FORM
from raytune_ft.model.fastpath.lane import LANE, Packed
from raytune_ft.model.loss import Attention

SEGMENTS = ((0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1))
BOUNDS = (0, 5, 12, 20, 24)
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of what a layer adds to its input, the share by which its two forms may differ: some hundred
roundings of each type. A wrong rotation or mask changes a tenth and more."""


@dataclass
class _Call:
    """What a layer got and gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: torch.Tensor


@torch.no_grad()
def differing(model: Any, layers: Sequence[nn.Module]) -> dict[tuple[Any, ...], float]:
    """Return the makes of layers whose forms differ too much, and by how much.

    Args:
        model: the causal language model, fast forms installed.
        layers: its decoder layers.
    """
    first = {make_of(layer): layer for layer in reversed(layers)}
    was_training = model.training
    model.eval()
    try:
        calls = _plain_calls(model, list(first.values()))
        found = {make: _difference(layer, calls[layer]) for make, layer in first.items()}
    finally:
        model.train(was_training)
    return {make: size for make, (size, allowed) in found.items() if not size <= allowed}


def make_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return what layers that compute alike have in common."""
    parts = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    windows = tuple(m.__dict__[FORM].window for m in layer.modules() if FORM in m.__dict__)
    return type(layer).__name__, parts, windows


def _plain_calls(model: Any, layers: Sequence[nn.Module]) -> dict[nn.Module, _Call]:
    """Run the model its own way and note what some layers got and gave."""
    calls: dict[nn.Module, _Call] = {}

    def note(
        layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        calls[layer] = _Call(args, kwargs, output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    device = next(layers[0].parameters()).device  # the embedding may lie on the host
    segments = torch.tensor(SEGMENTS, device=device)
    positions = torch.tensor([*range(5), *range(7), *range(8), *range(4)], device=device)
    words = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(segments.numel(), device=device) * 7 + 3) % words
    try:
        model.base_model(
            input_ids=ids.view_as(segments),
            position_ids=positions.view_as(segments),
            attention_mask=Attention(model.config.get_text_config()).mask(segments),
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _difference(layer: nn.Module, call: _Call) -> tuple[float, float]:
    """Return by how much a layer's forms differ, and how much they may."""
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=call.output.device)
    packed = Packed(bounds, max(b - a for a, b in pairwise(BOUNDS)))
    with LANE.entered():
        output = layer(*call.args, **{**call.kwargs, "packed": packed})
    added = (call.output - call.args[0]).float()
    size = float((output - call.output).float().norm() / added.norm())
    return size, ALLOWED.get(call.output.dtype, 0.0)
