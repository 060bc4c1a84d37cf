"""A key-value cache of fixed shapes: one that grows in, one that a CUDA graph can use out.

transformers' StaticCache counts the tokens of each layer apart, three launches a layer and step,
and keeps windows in layers whose shapes change on the way. Here all layers share one counter, and
a layer with a window has the room of all tokens: its mask hides what lies before the window.

Shapes: B = rows, H = key heads, S = tokens that there is room for, D = width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that hold keys and values by token and nothing else."""


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values (B, H, S, D); a new token's go where the shared counter stands."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, size: int, place: torch.Tensor):
        super().__init__(max_cache_len=size)
        # zeros: what is masked is still multiplied, and memory as it comes may hold a NaN
        self.keys = keys.new_zeros(*keys.shape[:2], size, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], size, values.shape[3])
        self.place = place
        self.cumulative_length = place[0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one token's keys and values (B, H, 1, D) in; return those of all S."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


def is_growing(cache: Any) -> bool:
    """Return whether all that a cache holds are keys and values by token."""
    return bool(cache.layers) and all(type(layer) in GROWING for layer in cache.layers)


def bytes_of(cache: Any, rows: int, size: int) -> int:
    """Return what `rows` with room for `size` tokens each take in fixed shapes."""
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            total += states[:1, :, :1].numel() * states.element_size()
    return total * rows * size


def fixed(cache: Any, size: int, place: torch.Tensor, rows: int) -> Cache:
    """Return an empty cache for `rows` of `size` tokens, whose next token goes to `place` (1,)."""
    layers = [
        FixedLayer(
            layer.keys[:1].expand(rows, -1, -1, -1),
            layer.values[:1].expand(rows, -1, -1, -1),
            size,
            place,
        )
        for layer in cache.layers
    ]
    return Cache(layers=layers)


def fill(target: Cache, cache: Any, rows: torch.Tensor, n: int) -> None:
    """Put the first `n` tokens of some rows of a cache of either kind into a fixed one."""
    for new, layer in zip(target.layers, cache.layers, strict=True):
        for to, states in ((new.keys, layer.keys), (new.values, layer.values)):
            held = states[:, :, :n]  # a window holds the last few
            to[:, :, n - held.shape[2] : n] = held[rows]


def growing(config: Any, cache: Cache, rows: torch.Tensor, n: int) -> DynamicCache:
    """Return a cache that grows, with the first `n` tokens of some rows of a fixed one."""
    found = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        found.update(layer.keys[rows, :, :n], layer.values[rows, :, :n], index)
    return found
