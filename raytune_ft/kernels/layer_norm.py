"""LayerNorm with the residual sum before it: hidden states in, normed states and their sum out.

y = (x - mean(x)) / sqrt(var(x) + eps) * w + b, in float32 or better whatever the type of x, rounded
once at the end, as torch's own does (Ba, Kiros, Hinton, 2016). Alone it is torch's, one launch.

Shapes: D = width of a row, ... = any leading dimensions.
"""

from __future__ import annotations

import torch

from raytune_ft.kernels.launch import has_triton

Tensor = torch.Tensor


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the normed rows of `x + residual`, and the sum itself in their type.

    Args:
        x: (..., D).
        residual: like `x`.
        weight: (D,), of the type of `x`; its gradient is made where it asks for one.
        bias: like `weight`, or None.
        eps: added to the variance.
    """
    if has_triton(x) and x.dtype is not torch.float64:
        from raytune_ft.kernels import layer_norm_triton

        return layer_norm_triton.add_layer_norm(x, residual, weight, bias, eps)
    return reference_add_layer_norm(x, residual, weight, bias, eps)


def reference_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Do what `add_layer_norm` does by torch's own operators."""
    total = x + residual
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps), total
