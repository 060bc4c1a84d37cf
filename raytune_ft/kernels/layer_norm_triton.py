"""LayerNorm's Triton programs and what launches them; `layer_norm` says what they compute.

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

from raytune_ft.kernels.norm_triton import ANY_NUMBER, PROGRAMS, shape_of

Tensor = torch.Tensor


@triton.jit(do_not_specialize=ANY_NUMBER)
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, scale_ptr,
    n_rows, width, eps, SHIFTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    known = columns < width
    inside = (rows < n_rows)[:, None] & known[None, :]
    at = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # the norm reads the sum as later layers do: rounded
    total = x.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=inside)
    x = total.to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :]
    if SHIFTS:
        y += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_NUMBER)
def _backward_kernel(
    dy_ptr, total_ptr, weight_ptr, mean_ptr, scale_ptr, added_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    n_rows, width,
    ADDS: tl.constexpr, TRAINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    known = columns < width
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    tile = program
    while tile * ROWS < n_rows:  # the interpreter's ranges take constants only
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < n_rows)[:, None] & known[None, :]
        at = rows[:, None] * width + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        normed = tl.where(inside, (x - mean) * scale, 0.0)
        pulled = dy * weight[None, :]
        along = tl.sum(pulled * normed, axis=1) / width
        level = tl.sum(pulled, axis=1) / width
        dx = (pulled - level[:, None] - normed * along[:, None]) * scale
        if ADDS:
            dx += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if TRAINS:
            dweight += tl.sum(dy * normed, axis=0)
            dbias += tl.sum(dy, axis=0)
        tile += tl.num_programs(0)
    if TRAINS:
        tl.store(dweight_ptr + program * width + columns, dweight, mask=known)
        tl.store(dbias_ptr + program * width + columns, dbias, mask=known)


class AddLayerNorm(torch.autograd.Function):
    """x, residual (..., D), weight (D,), bias (D,) or None -> normed, and the sum of both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        width = x.shape[-1]
        n_rows, total, y = x.numel() // width, torch.empty_like(x), torch.empty_like(x)
        mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        scale, shape = torch.empty_like(mean), shape_of(width)
        if n_rows:
            _forward_kernel[(triton.cdiv(n_rows, shape["ROWS"]),)](
                x, residual, weight, weight if bias is None else bias.contiguous(), y, total,
                mean, scale, n_rows, width, eps, SHIFTS=bias is not None, **shape,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, mean, scale)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dtotal = grads
        if dy is None:
            return dtotal, dtotal, None, None, None
        total, weight, mean, scale = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(total)
        dtotal = None if dtotal is None else dtotal.contiguous()
        n_rows, width, shape = len(scale), len(weight), shape_of(len(weight))
        trains = any(ctx.needs_input_grad[2:4])
        programs = triton.cdiv(n_rows, shape["ROWS"])
        programs = min(programs, PROGRAMS) if trains else programs
        parts = scale.new_zeros(2, max(1, programs), width) if trains else scale[None].expand(2, -1)
        if n_rows:
            _backward_kernel[(programs,)](
                dy, total, weight, mean, scale, dy if dtotal is None else dtotal, dx,
                parts[0], parts[1], n_rows, width, ADDS=dtotal is not None, TRAINS=trains, **shape,
            )  # fmt: skip
        sums = parts.sum(1).to(weight.dtype) if trains else (None, None)
        of_weight, of_bias = (
            one if wanted else None
            for one, wanted in zip(sums, ctx.needs_input_grad[2:4], strict=True)
        )
        return dx, dx, of_weight, of_bias, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `layer_norm.add_layer_norm`."""
    return AddLayerNorm.apply(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
