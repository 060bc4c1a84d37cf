"""Frozen weights multiplied in float8: products at nearly twice the rate, numbers of three bits.

Weights, activations and gradients are e4m3 with a float32 scale for each row, so that each row's
largest number is e4m3's largest. Weights stay as they are stored and become e4m3 at each use, in
one launch, or once where memory allows; the adapters beside them compute as ever. Only products
with frozen weights are meant: forward, and the gradient of the input, where weights are transposed
and their scales move into the gradient. A GPU's float8 products read both factors along the sum,
so the two passes need the weight in two orders: kept, that is a byte for each, 2 per weight.

Nothing here waits for the device: scales stay there, so passes run again and in CUDA graphs.
A CPU rounds as a GPU does and multiplies what is rounded in float32.

Shapes: T tokens, a weight is (out, in). torch wants both a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raytune_ft.kernels.launch import has_triton
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize_reference

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
SMALLEST = 1e-30
"""A row's largest number counts as at least this, so that rows of zeros have a scale. Gradients of
a token's mean loss, times a weight's scale, come down to 1e-13 and less."""
UNIT = 16
"""What torch wants widths to be a multiple of."""
CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in float8."""
FEW_ROWS = 512
"""Fewer are filled up: on an H100 cuBLAS has no product of up to 256 rows that are 9,216 long
(github.com/pytorch/ao, issue 4582)."""


def refusal(device: torch.device) -> str | None:
    """Return why a device cannot multiply in float8; None if it can, or emulates it."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= CAPABILITY:
        return _failure(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, float8 needs 8.9 or more"


def _failure(device: torch.device) -> str | None:
    """Multiply once: some newer GPUs have no product with a scale for each row."""
    ones = torch.ones(FEW_ROWS, 64, device=device)
    rows = quantize_rows(ones)
    try:
        _product(rows, rows.values, rows.scales.t().contiguous(), torch.bfloat16)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        return f"torch {torch.__version__} has no products of float8 by rows here ({said})"
    return None


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
    kept: dict[bool, Tensor] = field(default_factory=dict)
    """In e4m3: False -> (out, in), True -> (in, out); empty: made at each use."""

    @classmethod
    def of(cls, source: Nf4Weight | Tensor, matrix: Tensor) -> Fp8Weight:
        """Take a weight and, for now, what it is unpacked: (out, in)."""
        least, most = matrix.aminmax(dim=1)
        highest = torch.maximum(most, -least).float().clamp_min(SMALLEST)
        ones = torch.ones(1, matrix.shape[1], device=matrix.device)
        return cls(source, highest / LARGEST, ones)

    def keep(self) -> None:
        """Hold the weight in e4m3 from now on, in both orders: 2 bytes a weight.

        On a CPU one order serves both passes.
        """
        values = eighth(self.source, self.scales, transposed=False)
        turned = values.t()
        if values.is_cuda:
            turned = eighth(self.source, self.scales, transposed=True)
        self.kept.update({False: values, True: turned})

    def values(self, *, transposed: bool) -> Tensor:
        """Return the weight in e4m3: (out, in), or (in, out)."""
        found = self.kept.get(transposed)
        return eighth(self.source, self.scales, transposed=transposed) if found is None else found

    def times(self, x: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return `x W^T + bias`: (T, out)."""
        weight = self.values(transposed=False)
        return _product(x, weight, self.scales.unsqueeze(0), dtype, bias)

    def back(self, gradient: Tensor) -> Tensor:
        """Return `gradient W`: (T, in), of the gradient's dtype."""
        weight = self.values(transposed=True)
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
    if has_triton(scales) and fits(source.shape):
        from raytune_ft.kernels import fp8_triton

        return fp8_triton.eighth(source, scales, transposed=transposed)
    if isinstance(source, Nf4Weight):
        # as in one launch: a weight is not rounded to its own type on the way
        source = dequantize_reference(replace(source, dtype=torch.float32))
    values = (source.float() / scales.unsqueeze(1)).to(E4M3)
    return (values.t() if transposed else values).contiguous()


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
    rows, half = len(x.values), torch.bfloat16
    x = filled_up(x)
    # Hopper's fast sums cut off what lies below some 14 bits. Where terms have one sign that adds
    # up, to a tenth of a sum of 11,008 (tests/gpu); a CPU's emulation does not show it.
    out = torch._scaled_mm(
        x.values, weight.t(), x.scales, scales, bias=None if bias is None else bias.to(half),
        out_dtype=half, use_fast_accum=False,
    )  # fmt: skip
    return out[:rows].to(dtype)


def filled_up(x: Rows) -> Rows:
    """Return x with rows of zeros behind it, so that there are `FEW_ROWS`."""
    missing = FEW_ROWS - len(x.values)
    if missing <= 0:
        return x
    below = (0, 0, 0, missing)
    values = torch.nn.functional.pad(x.values.view(torch.uint8), below).view(x.values.dtype)
    return Rows(values, torch.nn.functional.pad(x.scales, below, value=1.0))
