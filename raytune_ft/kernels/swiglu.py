"""Gated MLP's middle: two products of the same input in, act(gate) * up out (Shazeer, 2020).

Saves gate and up alone; the activation is made again in the backward pass.

Shapes: M = width of the MLP, ... = any leading dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch

from raytune_ft.kernels.launch import has_triton

Tensor = torch.Tensor
Activation = Literal["silu", "gelu_tanh"]
"""`gelu_tanh` is Gemma's, transformers' "gelu_pytorch_tanh"."""


def swiglu(gate: Tensor, up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """Return act(gate) * up.

    Args:
        gate: (..., M); rows may lie apart, as in one half of a wider tensor.
        up: (..., M), of the same type.
        activation: of the gate.

    Returns:
        (..., M), contiguous, rounded once.
    """
    if has_triton(gate) and gate.dtype is not torch.float64:
        from raytune_ft.kernels import swiglu_triton

        return swiglu_triton.swiglu(gate, up, activation)
    return reference_swiglu(gate, up, activation=activation)


def fused_swiglu(gate_up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """Return act(gate) * up of one tensor (..., 2M), the gate in its first half.

    Its gradient is made as one tensor too, which slices would have to be joined to.
    """
    if has_triton(gate_up) and gate_up.dtype is not torch.float64:
        from raytune_ft.kernels import swiglu_triton

        return swiglu_triton.fused_swiglu(gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    return reference_swiglu(gate, up, activation=activation)


def reference_swiglu(gate: Tensor, up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """Do what `swiglu` does by torch's own operators."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
