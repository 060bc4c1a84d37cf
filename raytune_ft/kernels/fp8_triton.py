"""The Triton forms of `fp8.quantize_rows` and `fp8.eighth`: one launch each."""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_ft.kernels.fp8 import E4M3, LARGEST, SMALLEST
from raytune_ft.kernels.launch import ceil_div
from raytune_ft.kernels.nf4 import Nf4Weight

ROWS, COLUMNS = 128, 64
"""Of a weight that one program unpacks."""


def quantize_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values (rows, columns) and scales (rows, 1); a program takes a row."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _quantize_rows[(rows,)](
        x, scales if factors is None else factors, values, scales, columns, x.stride(0),
        FACTORS=factors is not None, LARGEST=LARGEST, SMALLEST=SMALLEST,
        BLOCK=triton.next_power_of_2(columns), num_warps=8,
    )  # fmt: skip
    return values, scales


def eighth(weight: Nf4Weight | Tensor, scales: Tensor, *, transposed: bool) -> Tensor:
    """Return a weight, of a width by `fp8.fits`, in e4m3: (out, in), or (in, out)."""
    rows, columns = weight.shape
    shape = (columns, rows) if transposed else (rows, columns)
    out = torch.empty(shape, dtype=E4M3, device=scales.device)
    grid = ceil_div(rows, ROWS), ceil_div(columns, COLUMNS)
    if isinstance(weight, Tensor):
        _eighth_of_plain[grid](
            weight, scales, out, rows, columns, *weight.stride(),
            TRANSPOSED=transposed, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        return out
    nested = weight.nested
    # without double quantisation three arguments are placeholders that nothing reads
    inner = nested or weight
    _eighth[grid](
        weight.packed.view(torch.int32), weight.code, weight.absmax, inner.absmax, inner.code,
        weight.code if nested is None else nested.offset, scales, out, rows, columns,
        BLOCK=weight.blocksize, OUTER=1 if nested is None else nested.blocksize,
        NESTED=nested is not None, TRANSPOSED=transposed, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_rows(
    x, factors, values, scales, columns, x_stride,
    FACTORS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if FACTORS:
        wide *= tl.load(factors + column, mask=inside, other=0.0)
    highest = tl.maximum(tl.max(tl.abs(wide), axis=0), SMALLEST)
    value = (wide * (LARGEST / highest)).to(values.dtype.element_ty)
    tl.store(values + row * columns + column, value, mask=inside)
    tl.store(scales + row, highest / LARGEST)


@triton.jit
def _eighth(
    packed, code, absmax, outer_absmax, outer_code, offset, scales, out, rows, columns,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    along = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    there = (row < rows)[:, None] & (along < columns // 8)[None, :]
    word = row.to(tl.int64)[:, None] * (columns // 8) + along[None, :]
    bits = tl.load(packed + word, mask=there, other=0)
    block = word // (BLOCK // 8)
    scale = tl.load(absmax + block, mask=there, other=0)
    if NESTED:
        outer = tl.load(outer_absmax + block // OUTER, mask=there, other=0.0)
        scale = tl.load(outer_code + scale.to(tl.int32)) * outer + tl.load(offset)
    scale = scale / tl.load(scales + row, mask=row < rows, other=1.0)[:, None]
    half = (bits[:, :, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, None, :]) & 15
    value = (tl.load(code + half) * scale[:, :, None]).reshape(ROWS, COLUMNS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _write(out, value, row, column, rows, columns, TRANSPOSED)


@triton.jit
def _eighth_of_plain(
    weight, scales, out, rows, columns, row_stride, column_stride,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    scale = tl.load(scales + row, mask=row < rows, other=1.0)[:, None]
    value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) / scale
    _write(out, value, row, column, rows, columns, TRANSPOSED)


@triton.jit
def _write(out, value, row, column, rows, columns, TRANSPOSED: tl.constexpr):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if TRANSPOSED:
        at = column.to(tl.int64)[None, :] * rows + row[:, None]
    else:
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
