"""RMSNorm's Triton programs and what launches them; `norm` says what they compute.

A program takes a few whole rows. Imported only where Triton runs.
"""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

TILE = 4096
"""Numbers that a program holds at once where rows are short."""
PROGRAMS = 512
"""Programs that sum a weight's gradient, each over its share of the rows."""
ANY_NUMBER = ["n_rows"]
"""Triton would compile anew for multiples of 16 and for 1, and micro-batches differ."""


@triton.jit(do_not_specialize=ANY_NUMBER)
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, scale_ptr,
    n_rows, width, eps, offset,
    ADDS: tl.constexpr, OFFSETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADDS:
        x = x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # the norm reads the sum as later layers do: rounded
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, x, mask=inside)
    narrow = x.dtype
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    normed = x * scale[:, None]
    if OFFSETS:
        normed = normed * (weight + offset)[None, :]
    else:
        normed = normed.to(narrow).to(tl.float32) * weight[None, :]
    tl.store(y_ptr + at, normed.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_NUMBER)
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, added_ptr, dx_ptr, dweight_ptr,
    n_rows, width, offset,
    ADDS: tl.constexpr, OFFSETS: tl.constexpr, TRAINS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if OFFSETS:
        weight += offset
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    tile = program
    while tile * ROWS < n_rows:  # the interpreter's ranges take constants only
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * scale
        pulled = dy * weight[None, :]
        mean = tl.sum(pulled * normed, axis=1) / width
        dx = (pulled - normed * mean[:, None]) * scale
        if ADDS:
            dx += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if TRAINS:
            seen = normed if OFFSETS else normed.to(x.dtype).to(tl.float32)
            dweight += tl.sum(dy * seen, axis=0)
        tile += tl.num_programs(0)
    if TRAINS:
        tl.store(dweight_ptr + program * width + columns, dweight, mask=columns < width)


class RmsNorm(torch.autograd.Function):
    """x (..., D), residual (..., D) or None, weight (D,) -> normed, and the sum of both if any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor | None]:
        x, weight = x.contiguous(), weight.contiguous()
        added = None if residual is None else residual.contiguous()
        width = x.shape[-1]
        n_rows = x.numel() // width
        total = x if added is None else torch.empty_like(x)
        dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
        y = torch.empty_like(x, dtype=dtype)
        scale = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        shape = shape_of(width)
        _forward_kernel[(triton.cdiv(n_rows, shape["ROWS"]),)](
            x, x if added is None else added, weight, y, total, scale, n_rows, width, eps, offset,
            ADDS=added is not None, OFFSETS=offset != 0, **shape,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.adds = offset, added is not None
        ctx.set_materialize_grads(False)
        return y, total if ctx.adds else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dtotal = grads
        if dy is None:
            return dtotal, dtotal if ctx.adds else None, None, None, None
        total, weight, scale = ctx.saved_tensors
        dy = dy.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx = torch.empty_like(total)
        shape = shape_of(total.shape[-1])
        trains = ctx.needs_input_grad[2]
        n_rows = len(scale)
        programs = triton.cdiv(n_rows, shape["ROWS"])
        programs = min(programs, PROGRAMS) if trains else programs
        parts = scale.new_empty(programs, len(weight)) if trains else scale
        _backward_kernel[(programs,)](
            dy, total, weight, scale, dy if dtotal is None else dtotal, dx, parts,
            n_rows, len(weight), ctx.offset,
            ADDS=dtotal is not None, OFFSETS=ctx.offset != 0, TRAINS=trains, **shape,
        )  # fmt: skip
        dweight = parts.sum(0).to(weight.dtype) if trains else None
        return dx, dx if ctx.adds else None, dweight, None, None


def shape_of(width: int) -> dict[str, int]:
    """Return how programs are laid out for rows of some width."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512))}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See `norm.rms_norm`."""
    y, _ = RmsNorm.apply(x, None, weight, eps, offset)
    return y  # type: ignore[no-any-return]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """See `norm.add_rms_norm`."""
    return RmsNorm.apply(x, residual, weight, eps, offset)  # type: ignore[no-any-return]
