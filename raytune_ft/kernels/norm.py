"""RMSNorm, alone and with the residual sum before it: hidden states in, normed states out.

y = x / sqrt(mean(x^2) + eps) * w, in float32 or better whatever the type of x. Where it rounds
differs by family: Llama's rounds to the type of x before the weight, Gemma's (weights stored as
w - 1, `offset` 1) after it.

Shapes: D = width of a row, ... = any leading dimensions.
"""

from __future__ import annotations

import torch

from raytune_ft.kernels.launch import has_triton

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return the normed rows of `x`.

    Args:
        x: (..., D).
        weight: (D,); its gradient is made where it asks for one.
        eps: added to the mean square.
        offset: 0 for weights as they are, rounding before them; anything else is added to them
            in float32, rounding after them.

    Returns:
        (..., D), of the type of `x`; with `offset` 0 of the wider of its and the weight's type.
    """
    if has_triton(x) and x.dtype is not torch.float64:
        from raytune_ft.kernels import norm_triton

        return norm_triton.rms_norm(x, weight, eps, offset)
    return reference_rms_norm(x, weight, eps, offset=offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the normed rows of `x + residual`, and the sum itself in their type.

    Arguments as for `rms_norm`; `residual` (..., D) has the type of `x`.
    """
    if has_triton(x) and x.dtype is not torch.float64:
        from raytune_ft.kernels import norm_triton

        return norm_triton.add_rms_norm(x, residual, weight, eps, offset)
    return reference_add_rms_norm(x, residual, weight, eps, offset=offset)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Do what `rms_norm` does by torch's own operators, in the order of transformers' modules."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def reference_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Do what `add_rms_norm` does by torch's own operators."""
    total = x + residual
    return reference_rms_norm(total, weight, eps, offset=offset), total
