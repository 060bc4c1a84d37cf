"""NormHead: Baichuan2's output head, whose rows count by their direction only.

logits = h W^T / |W| with |W| the Euclidean length of each row. Where the head is frozen, the rows
are divided once (`fold`): the same logits for less work. Where it is trained, the length stays in
the forward pass, as in the original's training: only so is the gradient that of the original.

Shapes: V = words, H = width, T = tokens, r = rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from raytune_ft.errors import RecipeError

SMALLEST = 1e-12
"""Rows shorter than this are divided by this (torch's `normalize`)."""


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """Return the lengths (V,) of rows, in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lengths: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return lengths.clamp_min(SMALLEST)


def normalised(weight: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 in the weight's own type."""
    return (weight / row_lengths(weight).unsqueeze(1)).to(weight.dtype)


class NormHead(nn.Linear):
    """A linear layer without bias that divides its outputs by the lengths of its rows."""

    folded = False
    """The rows have length 1 already."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (T, V) of hidden (T, H)."""
        logits = super().forward(hidden)
        if self.folded:
            return logits
        return (logits / row_lengths(self.weight)).to(logits.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Give every row length 1, in place; for a head that is not trained."""
        # a few thousand rows at a time: a float32 copy of all of them would be gigabytes
        for start in range(0, self.out_features, 8192):
            rows = self.weight[start : start + 8192]
            rows.copy_(normalised(rows))
        self.folded = True


class LoraNormHead(LoraLinear):  # type: ignore[misc]
    """A low-rank update inside the length: h (W + sBA)^T / |W + sBA|.

    PEFT's own layer would add the update after the division, which no head of the original layout
    could repeat.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        if config.use_dora:
            raise RecipeError(
                "lora.use_dora: not for the output head of Baichuan2, whose rows have no length "
                "of their own; take lm_head out of lora.targets"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return logits (T, V) of x (T, H)."""
        head: NormHead = self.get_base_layer()
        name = self.active_adapters[0]
        if self.disable_adapters or self.merged or name not in self.lora_A:
            logits: torch.Tensor = head(x)
            return logits
        a, b, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        plain = nn.functional.linear(x, head.weight)
        update: torch.Tensor = b(a(self.lora_dropout[name](x.to(a.weight.dtype)))) * scale
        lengths = _lengths_with_update(head.weight, a.weight, b.weight, scale)
        return ((plain + update) / lengths).to(plain.dtype)


def _lengths_with_update(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the row lengths of W + sBA by products of rank r; the sum itself is never built."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype) * scale
    cross = ((weight @ a.to(weight.dtype).T).to(dtype) * b).sum(1)
    squares = row_lengths(weight).square() + 2 * cross + ((b @ (a @ a.T)) * b).sum(1)
    lengths: torch.Tensor = squares.clamp_min(SMALLEST**2).sqrt()
    return lengths
