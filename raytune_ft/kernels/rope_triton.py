"""The rotation's Triton program and what launches it; `rope` says what it computes.

A program turns all heads of one token, queries and keys, by angles that it loads once. Imported
only where Triton runs.
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


@triton.jit
def _turn(
    x_ptr, y_ptr, x_head, y_head, cos, sin, half, width, heads,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    narrow = y_ptr.dtype.element_ty
    if INTERLEAVED:
        # read side by side and parted then: every second number alone takes eight times the reads
        both = tl.arange(0, 2 * HALF)[None, :]
        inside = (head < heads) & (both < 2 * half)
        x = tl.load(x_ptr + head * x_head + both, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [HEADS, HALF, 2]))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [HEADS, 2 * HALF])
        tl.store(y_ptr + head * y_head + both, y.to(narrow), mask=inside)
    else:
        pair = tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (pair < half)
        here = x_ptr + head * x_head + pair
        a = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(here + half, mask=inside, other=0.0).to(tl.float32)
        there = y_ptr + head * y_head + pair
        tl.store(there, (a * cos - b * sin).to(narrow), mask=inside)
        tl.store(there + half, (b * cos + a * sin).to(narrow), mask=inside)
    if REST:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        beside = (head < heads) & (rest < width)
        kept = tl.load(x_ptr + head * x_head + rest, mask=beside, other=0.0)
        tl.store(y_ptr + head * y_head + rest, kept, mask=beside)


@triton.jit(do_not_specialize=["length"])  # else compiled anew for some lengths
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out, k_out,
    q_row, q_head, q_token, k_row, k_head, k_token, angle_row, angle_token,
    length, half, width, q_heads, k_heads, sign,
    INTERLEAVED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, token = place // length, place % length
    pair = tl.arange(0, HALF)[None, :]
    angle = row * angle_row + token * angle_token + pair
    cos = tl.load(cos_ptr + angle, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=pair < half, other=0.0).to(tl.float32) * sign
    _turn(
        q_ptr + row * q_row + token * q_token, q_out + place * q_heads * width, q_head, width,
        cos, sin, half, width, q_heads, INTERLEAVED, Q_HEADS, HALF, REST,
    )  # fmt: skip
    _turn(
        k_ptr + row * k_row + token * k_token, k_out + place * k_heads * width, k_head, width,
        cos, sin, half, width, k_heads, INTERLEAVED, K_HEADS, HALF, REST,
    )  # fmt: skip


class Rope(torch.autograd.Function):
    """q (B, H, L, D), k (B, K, L, D), cos and sin (B or 1, L, R) -> both rotated."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(q, k, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # a rotation's transpose is the rotation back
        dq, dk = _rotate(grads[0], grads[1], cos, sin, ctx.interleaved, -1.0)
        return dq, dk, None, None, None


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float
) -> tuple[Tensor, Tensor]:
    q, k = _dense_heads(q), _dense_heads(k)
    rows, q_heads, length, width = q.shape
    half = cos.shape[-1] // 2
    cos, sin = _dense_heads(cos.expand(rows, -1, -1)), _dense_heads(sin.expand(rows, -1, -1))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    q_out = q.new_empty(rows, length, q_heads, width)
    k_out = k.new_empty(rows, length, k.shape[1], width)
    rest = width - 2 * half
    sizes = {
        "Q_HEADS": triton.next_power_of_2(q_heads),
        "K_HEADS": triton.next_power_of_2(k.shape[1]),
        "HALF": triton.next_power_of_2(half),
        "REST": triton.next_power_of_2(rest) if rest else 0,
    }
    _rope_kernel[(rows * length,)](
        q, k, cos, sin, q_out, k_out,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        cos.stride(0), cos.stride(1),
        length, half, width, q_heads, k.shape[1], sign,
        INTERLEAVED=interleaved, num_warps=4, **sizes,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `rope.rope`."""
    return Rope.apply(q, k, cos, sin, interleaved)  # type: ignore[no-any-return]
