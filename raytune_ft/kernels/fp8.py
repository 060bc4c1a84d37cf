"""Frozen weights multiplied in float8: products at nearly twice the rate, numbers of three bits.

Weights and activations are e4m3 with a float32 scale for each row, so that each row's largest
number is e4m3's largest. NF4 weights stay packed and become e4m3 at each use, in one launch; the
adapters beside them compute as ever. Only products with frozen weights are meant: forward, and the
gradient of the input, where weights are transposed and their scales move into the gradient.

Shapes: T tokens, a weight is (out, in). torch wants both a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_ft.kernels.launch import has_triton
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize_reference

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
SMALLEST = 1e-12
"""A row's largest number counts as at least this, so that rows of zeros have a scale."""
UNIT = 16
"""What torch wants widths to be a multiple of."""


@dataclass(frozen=True)
class Rows:
    """Numbers in e4m3, each row by its own scale."""

    values: Tensor
    """(rows, columns) e4m3."""
    scales: Tensor
    """(rows, 1) float32: what values are multiplied by."""


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight, packed or plain, and the scales of its rows in e4m3."""

    source: Nf4Weight | Tensor
    scales: Tensor
    """(out,) float32."""
    ones: Tensor
    """(1, in) float32: scales that have moved elsewhere."""

    @classmethod
    def of(cls, source: Nf4Weight | Tensor, matrix: Tensor) -> Fp8Weight:
        """Take a weight and, for now, what it is unpacked: (out, in)."""
        highest = matrix.abs().amax(1).float().clamp_min(SMALLEST)
        ones = torch.ones(1, matrix.shape[1], device=matrix.device)
        return cls(source, highest / LARGEST, ones)

    def times(self, x: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x W^T + bias`: (T, out)."""
        weight = eighth(self.source, self.scales, transposed=False)
        return _product(x, weight, self.scales.unsqueeze(0), dtype, bias)

    def back(self, gradient: Tensor) -> Tensor:
        """Return `gradient W`: (T, in), of the gradient's dtype."""
        weight = eighth(self.source, self.scales, transposed=True)
        return _product(quantize_rows(gradient, self.scales), weight, self.ones, gradient.dtype)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> Rows:
    """Return x (rows, columns) in e4m3, its columns multiplied by `factors` (columns,) before."""
    if has_triton(x):
        from raytune_ft.kernels import fp8_triton

        return Rows(*fp8_triton.quantize_rows(x, factors))
    wide = x.float() if factors is None else x.float() * factors
    highest = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    return Rows((wide * (LARGEST / highest)).to(E4M3), highest / LARGEST)


def eighth(source: Nf4Weight | Tensor, scales: Tensor, *, transposed: bool) -> Tensor:
    """Return a weight in e4m3, each of its rows divided by its scale.

    Args:
        source: (out, in), packed or plain.
        scales: (out,) float32.
        transposed: give (in, out) instead of (out, in).
    """
    if isinstance(source, Nf4Weight):
        if has_triton(source.packed) and fits(source.shape):
            from raytune_ft.kernels import fp8_triton

            return fp8_triton.eighth(source, scales, transposed=transposed)
        source = dequantize_reference(source)
    values = (source.float() / scales.unsqueeze(1)).to(E4M3)
    return values.t().contiguous() if transposed else values


def fits(shape: torch.Size) -> bool:
    """Tell whether torch multiplies a weight of this shape in float8."""
    return all(size % UNIT == 0 for size in shape)


def _product(
    x: Rows, weight: Tensor, scales: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return x times the transpose of `weight`, whose rows have `scales` (1, rows)."""
    if not x.values.is_cuda:
        exact = (x.values.float() @ weight.float().t()) * x.scales * scales
        return (exact if bias is None else exact + bias.float()).to(dtype)
    half = torch.bfloat16
    out = torch._scaled_mm(
        x.values, weight.t(), x.scales, scales, bias=None if bias is None else bias.to(half),
        out_dtype=half, use_fast_accum=True,
    )  # fmt: skip
    return out.to(dtype)
