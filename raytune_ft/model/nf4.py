"""NF4 on a CPU as it is meant: the same weights in training, answering and merging.

bitsandbytes 0.50.2 has two CPU paths that go wrong without a word. One repacks weights; the other
unpacks them row by row, as if each row began a new block of 64 weights, while blocks run on over
the ends of rows. So a layer whose input width is no multiple of 64 gets the scales of other
weights. Both are routed around here; tests/model/test_nf4.py holds the second.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from raytune_ft.errors import RecipeError

BLOCK = 64
"""Weights that share a scale."""


def through_nf4(weight: torch.Tensor, *, double_quant: bool) -> torch.Tensor:
    """Quantise a weight of any shape to NF4 and back, as training sees it."""
    packed, state = quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=double_quant
    )
    return dequantized(packed, state)


def through_int8(weight: torch.Tensor) -> torch.Tensor:
    """Quantise a weight (out, in) to int8 and back, as LLM.int8 stores it: a scale per row."""
    packed, scales, _ = int8_vectorwise_quant(weight.half())
    seen: torch.Tensor = int8_vectorwise_dequant(packed, scales).to(weight.dtype)
    return seen


def dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weight that bitsandbytes packed, in its own shape, blocks in their true places."""
    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel(),))
    weight: torch.Tensor = dequantize_4bit(packed, flat)
    return weight.view(state.shape)


def mend_cpu_layers(model: torch.nn.Module) -> None:
    """Make a model's NF4 layers on the CPU compute with the weights that were stored.

    Without this, on a CPU with AVX512-BF16 layers repack themselves at the first evaluation: the
    packed layout rounds the scales and its kernel has no gradient, so after a sampled answer
    training would go on with other weights and without gradients below the last layer. And layers
    of odd width (module docstring) would compute with wrong weights on any CPU.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        on_cpu = isinstance(module, Linear4bit) and module.weight.device.type == "cpu"
        if on_cpu and module.in_features % BLOCK:
            module.__class__ = _OddLinear4bit


def check_dora(model: torch.nn.Module) -> None:
    """Refuse DoRA where PEFT would read a quantised weight wrongly: on a CPU, and there alone.

    It reads odd NF4 layers by the kernel described above, and int8 layers lose their scales.

    Raises:
        RecipeError: the model has such a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, _OddLinear4bit):
            what = f"is NF4 of width {module.in_features}, no multiple of {BLOCK}"
        elif isinstance(module, Linear8bitLt) and module.weight.device.type == "cpu":
            what = "is int8"
        else:
            continue
        raise RecipeError(
            f"lora.use_dora: {name} {what}, which DoRA cannot read on a CPU; set "
            "model.quantization: none"
        )


class _OddLinear4bit(Linear4bit):  # type: ignore[misc]
    """A frozen NF4 layer of odd input width, on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute as Linear4bit does, with the blocks in their true places."""
        given = x.dtype
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        out: torch.Tensor = _Matmul.apply(x, self.weight, self.weight.quant_state)  # type: ignore[no-untyped-call]
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(given)


class _Matmul(torch.autograd.Function):
    """x (..., in) times a packed weight (out, in); unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.packed, ctx.state = packed, state
        return torch.nn.functional.linear(x, dequantized(packed, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        weight = dequantized(ctx.packed, ctx.state).to(gradient.dtype)
        return gradient @ weight, None, None
