"""The gate's Triton programs and what launches them; `swiglu` says what they compute.

Imported only where Triton runs.
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

BLOCK = 1024
"""Columns of a row that a program takes."""


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """Return the activation and its derivative."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        bend = _tanh(inner)
        slope = 0.7978845608028654 * (1 + 0.134145 * gate * gate)
        value = 0.5 * gate * (1 + bend)
        derivative = 0.5 * (1 + bend) + 0.5 * gate * (1 - bend * bend) * slope
    else:
        open_ = tl.sigmoid(gate)
        value = gate * open_
        derivative = open_ * (1 + gate * (1 - open_))
    return value, derivative


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_row, up_row, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(gate, GELU)
    y = (value * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + columns, y, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, gate_row, up_row, dgate_row, dup_row, width,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    value, derivative = _activation(gate, GELU)
    narrow = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * dgate_row + columns, (dy * up * derivative).to(narrow), mask=inside)
    tl.store(dup_ptr + row * dup_row + columns, (dy * value).to(narrow), mask=inside)


class Swiglu(torch.autograd.Function):
    """gate and up (..., M) -> act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        width = gate.shape[-1]
        dgate, dup = (grads[0].new_empty(gate.shape) for _ in range(2))
        into = dgate.view(-1, width), dup.view(-1, width)
        _pull(grads[0], gate, up, into, ctx.activation)
        return dgate, dup, None


class FusedSwiglu(torch.autograd.Function):
    """gate and up side by side, (..., 2M) -> act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        return _gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        both = grads[0].new_empty(gate_up.shape)
        dgate, dup = both.view(-1, both.shape[-1]).chunk(2, -1)
        _pull(grads[0], gate, up, (dgate, dup), ctx.activation)
        return both, None


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = gate.new_empty(gate.shape)
    width = gate.shape[-1]
    gate, up = _rows(gate), _rows(up)
    _forward_kernel[(len(gate), triton.cdiv(width, BLOCK))](
        gate, up, y, gate.stride(0), up.stride(0), width,
        GELU=activation == "gelu_tanh", BLOCK=BLOCK,
    )  # fmt: skip
    return y


def _pull(
    dy: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, Tensor], activation: str
) -> None:
    dgate, dup = into
    gate, up = _rows(gate), _rows(up)
    width = gate.shape[-1]
    _backward_kernel[(len(gate), triton.cdiv(width, BLOCK))](
        dy.contiguous(), gate, up, dgate, dup,
        gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), width,
        GELU=activation == "gelu_tanh", BLOCK=BLOCK,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `swiglu.swiglu`."""
    return Swiglu.apply(gate, up, activation)  # type: ignore[no-any-return]


def fused_swiglu(gate_up: Tensor, activation: str) -> Tensor:
    """See `swiglu.fused_swiglu`."""
    return FusedSwiglu.apply(gate_up, activation)  # type: ignore[no-any-return]
