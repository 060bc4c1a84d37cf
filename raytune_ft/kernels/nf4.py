"""NF4: a packed weight in, the same weight in bfloat16, float16 or float32 out, in one launch.

The numbers are bitsandbytes' own, bit for bit. Its layout: weights run row by row, two to a byte,
the first in the high half; `blocksize` of them share a scale, and blocks run on over the ends of
rows. With double quantisation the scales are bytes themselves: `code[byte] * absmax + offset`, in
float32, each operation rounded by itself. A weight is `code[half] * scale`, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytune_ft.errors import ModelError
from raytune_ft.kernels.launch import has_triton

CODES = 16
"""Values that a half byte stands for."""


@dataclass(frozen=True)
class NestedScales:
    """What turns byte scales into float32 ones."""

    code: Tensor
    """(256,) float32."""
    absmax: Tensor
    """(scales / blocksize, rounded up) float32."""
    offset: Tensor
    """() float32."""
    blocksize: int
    """Scales that share an `absmax`."""


@dataclass(frozen=True)
class Nf4Weight:
    """A weight as bitsandbytes packs it; the tensors are its own, not copies."""

    packed: Tensor
    """(weights / 2, rounded up) uint8."""
    absmax: Tensor
    """(weights / blocksize, rounded up): float32, or uint8 where `nested` is set."""
    code: Tensor
    """(16,) float32."""
    blocksize: int
    """Weights that share a scale."""
    shape: torch.Size
    """(out, in)."""
    dtype: torch.dtype
    """What the weight was before, and is again."""
    nested: NestedScales | None = None

    @classmethod
    def of(cls, module: torch.nn.Module) -> Nf4Weight:
        """Read a bitsandbytes Linear4bit.

        Raises:
            ModelError: it holds no NF4 weight, or one repacked for a CPU.
        """
        packed: Any = module.weight
        state: Any = getattr(packed, "quant_state", None)
        if state is None or state.quant_type != "nf4":
            raise ModelError(f"{type(module).__name__}: no NF4 weight; load it with nf4")
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(f"{type(module).__name__}: repacked for a CPU; load the model again")
        nested = None
        if state.nested:
            inner = state.state2
            nested = NestedScales(inner.code, inner.absmax, state.offset, inner.blocksize)
        flat = packed.detach().view(torch.uint8).view(-1)
        return cls(
            flat, state.absmax, state.code, state.blocksize, state.shape, state.dtype, nested
        )


def dequantize(weight: Nf4Weight, out: Tensor | None = None) -> Tensor:
    """Return the weight, (out, in), of its own dtype.

    Args:
        weight: packed.
        out: written and returned if given: contiguous, of the weight's shape and dtype.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)
    if has_triton(weight.packed):
        from raytune_ft.kernels import nf4_triton

        return nf4_triton.dequantize(weight, out)
    return out.copy_(dequantize_reference(weight))


def dequantize_reference(weight: Nf4Weight) -> Tensor:
    """Return the weight, (out, in), of its own dtype, by plain torch."""
    pairs = torch.cartesian_prod(weight.code, weight.code)[weight.packed.int()]
    scales = _scales(weight)
    blocks = torch.nn.functional.pad(
        pairs.view(-1), (0, scales.numel() * weight.blocksize - pairs.numel())
    )
    scaled = blocks.view(-1, weight.blocksize) * scales.unsqueeze(1)
    return scaled.view(-1)[: weight.shape.numel()].view(weight.shape).to(weight.dtype)


def _scales(weight: Nf4Weight) -> Tensor:
    nested = weight.nested
    if nested is None:
        return weight.absmax.float()
    outer = nested.absmax.repeat_interleave(nested.blocksize)[: weight.absmax.numel()]
    return nested.code[weight.absmax.int()] * outer + nested.offset
