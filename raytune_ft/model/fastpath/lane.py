"""Lane: whether modules compute in their fast form now, and what attention needs to know for it.

Training and held-out losses go the fast way; answers, which keep caches and read token by token,
go the way of transformers and PEFT.

Shapes: B = rows, L = padded length, S = segments, padding among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from raytune_ft.kernels.attention import mask_of, needs_mask
from raytune_ft.kernels.capped_attention import Reach, reach_of


@dataclass
class Lane:
    """Counts the losses that are being computed, and knows the batch of the layer that runs."""

    depth: int = 0
    packed: Packed | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let modules compute in their fast form, also where no gradient is wanted."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def within(self, packed: Packed) -> Iterator[None]:
        """Let what is called inside know the batch; a layer that runs again has its own."""
        before, self.packed = self.packed, packed
        try:
            yield
        finally:
            self.packed = before

    @property
    def is_fast(self) -> bool:
        """Whether a loss is computed, or a layer once more for its gradient."""
        return self.depth > 0 or torch.is_grad_enabled()


LANE = Lane()
"""Of this process."""


@dataclass(frozen=True)
class Packed:
    """Where the segments of a batch lie; layers get it in place of a mask."""

    cu_seqlens: torch.Tensor
    """(S + 1,), int32: bounds in the B * L tokens end to end."""
    max_seqlen: int
    """The longest segment's tokens."""
    seed: torch.Tensor | None = None
    """(1,), of all dropouts of adapters in the batch; None: each draws its own."""
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)
    """Made once for all layers, where attention needs one."""
    reaches: dict[int | None, Reach] = field(default_factory=dict)
    """The same for capped attention, by window."""

    def reseeded(self, number: int) -> Packed:
        """Return the same batch with other dropouts, told apart by a number."""
        return self if self.seed is None else replace(self, seed=self.seed + number)

    def reach(self, like: torch.Tensor, window: int | None) -> Reach:
        """Return which keys each token sees, for queries (B, H, L, D) like `like`."""
        if window not in self.reaches:
            tokens = like.shape[0] * like.shape[2]
            self.reaches[window] = reach_of(tokens, self.cu_seqlens, window)
        return self.reaches[window]

    def mask(
        self, like: torch.Tensor, window: int | None, slopes: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the mask for queries (B, H, L, D) like `like`; None where kernels need none."""
        bounds = self.cu_seqlens, self.max_seqlen
        if not needs_mask(like, *bounds, window=window, alibi_slopes=slopes):
            return None
        key = (window, slopes is not None, like.dtype)
        if key not in self.masks:
            rows, _, length, _ = like.shape
            self.masks[key] = mask_of(
                rows, length, self.cu_seqlens, like.dtype, window=window, alibi_slopes=slopes
            )
        return self.masks[key]


_joined: dict[tuple[type, type], type] = {}


def turn_into(module: nn.Module, form: type) -> None:
    """Give a module the class `form` in front of its own; parameters and names stay."""
    own = type(module)
    if (form, own) not in _joined:
        # a subclass, not a forward of the instance: transformers checkpoints the class's forward
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        _joined[form, own] = type(own.__name__, (form, own), names)
    module.__class__ = _joined[form, own]


def turn_back(module: nn.Module) -> None:
    """Give a module its own class again, if `turn_into` changed it."""
    if type(module) in _joined.values():
        module.__class__ = type(module).__mro__[2]
