"""Capped attention's Triton programs and what launches them; `capped_attention` says what they do.

Forward and queries' gradients: a program takes some queries of a head and goes over their keys.
Keys' and values' gradients: a program takes some keys of a key head and goes over the queries of
all heads that read it, so that sums have one order. Imported only where Triton runs.
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

FAR = -1e30
"""Score of what is not seen; finite, so that rows that saw nothing yet have no NaN."""
ANY_NUMBER = ["tokens"]
BLOCKS = ((64, 64), (64, 32), (32, 32), (16, 16))
"""Queries and keys of a program, the first pair that has room."""
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Capabilities of GPUs whose processors share 160 KiB and more; others have 99."""
SHARED, SHARED_ELSEWHERE = 100 << 10, 72 << 10
"""Bytes of it that one program may take."""
INTERPRETED = 16
"""Queries and keys of a program where Triton interprets."""


@triton.jit
def _load(ptr, rows, stride, width, inside, BLOCK_D: tl.constexpr):
    """Return rows (m, d) of a head, zeros outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, rows, stride, width, inside, values, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < width)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bent(q, k, scale, cap):
    """Return tanh(scale q k / cap), (m, n): scores in units of the cap."""
    raw = tl.dot(q, tl.trans(k), input_precision="ieee")
    return 2 * tl.sigmoid(raw * (2 * scale / cap)) - 1


@triton.jit(do_not_specialize=ANY_NUMBER)
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, sums_ptr, first_ptr, tokens, heads, keys, width, scale, cap,
    FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    of_q, of_k = heads * width, keys * width
    place = head // (heads // keys) * width
    q = _load(q_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
    first = tl.load(first_ptr + rows, mask=inside, other=tokens)
    start = tl.min(first, axis=0) // BLOCK_N * BLOCK_N
    end = tl.minimum(tokens, (tl.program_id(0) + 1) * BLOCK_M)
    highest = tl.full([BLOCK_M], FAR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    while start < end:  # the interpreter's ranges take constants only
        columns = start + tl.arange(0, BLOCK_N)
        known = columns < tokens
        k = _load(k_ptr + place, columns, of_k, width, known, BLOCK_D)
        v = _load(v_ptr + place, columns, of_k, width, known, BLOCK_D)
        seen = (columns[None, :] >= first[:, None]) & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, cap * _bent(q, k, scale, cap), FAR)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        found = found * shrink[:, None]
        found = tl.dot(weights.to(v.dtype), v, found, input_precision="ieee")
        highest = higher
        start += BLOCK_N
    _store(o_ptr + head * width, rows, of_q, width, inside, found / total[:, None], BLOCK_D)
    sums = sums_ptr + head.to(tl.int64) * tokens + rows
    tl.store(sums, highest + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=ANY_NUMBER)
def _backward_q(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, sums_ptr, pulls_ptr, first_ptr,
    tokens, heads, keys, width, scale, cap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    of_q, of_k = heads * width, keys * width
    place = head // (heads // keys) * width
    q = _load(q_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
    do = _load(do_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
    o = _load(o_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
    pull = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    at = head.to(tl.int64) * tokens + rows
    tl.store(pulls_ptr + at, pull, mask=inside)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    first = tl.load(first_ptr + rows, mask=inside, other=tokens)
    start = tl.min(first, axis=0) // BLOCK_N * BLOCK_N
    end = tl.minimum(tokens, (tl.program_id(0) + 1) * BLOCK_M)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    while start < end:
        columns = start + tl.arange(0, BLOCK_N)
        known = columns < tokens
        k = _load(k_ptr + place, columns, of_k, width, known, BLOCK_D)
        v = _load(v_ptr + place, columns, of_k, width, known, BLOCK_D)
        seen = (columns[None, :] >= first[:, None]) & (columns[None, :] <= rows[:, None])
        bent = _bent(q, k, scale, cap)
        weights = tl.where(seen, tl.exp(cap * bent - sums[:, None]), 0.0)
        raised = tl.dot(do, tl.trans(v), input_precision="ieee") - pull[:, None]
        inner = (weights * raised * (1 - bent * bent)).to(k.dtype)
        found = tl.dot(inner, k, found, input_precision="ieee")
        start += BLOCK_N
    _store(dq_ptr + head * width, rows, of_q, width, inside, found * scale, BLOCK_D)


@triton.jit(do_not_specialize=ANY_NUMBER)
def _backward_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, sums_ptr, pulls_ptr, first_ptr, last_ptr,
    tokens, heads, keys, width, scale, cap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < tokens
    of_q, of_k = heads * width, keys * width
    k = _load(k_ptr + key * width, columns, of_k, width, known, BLOCK_D)
    v = _load(v_ptr + key * width, columns, of_k, width, known, BLOCK_D)
    end = tl.max(tl.load(last_ptr + columns, mask=known, other=0), axis=0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    head = key * (heads // keys)
    while head < (key + 1) * (heads // keys):
        start = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M
        while start < end:
            rows = start + tl.arange(0, BLOCK_M)
            inside = rows < tokens
            q = _load(q_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
            do = _load(do_ptr + head * width, rows, of_q, width, inside, BLOCK_D)
            at = tl.cast(head, tl.int64) * tokens + rows
            sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
            pull = tl.load(pulls_ptr + at, mask=inside, other=0.0)
            first = tl.load(first_ptr + rows, mask=inside, other=tokens)
            seen = (columns[None, :] >= first[:, None]) & (columns[None, :] <= rows[:, None])
            bent = _bent(q, k, scale, cap)
            weights = tl.where(seen, tl.exp(cap * bent - sums[:, None]), 0.0)
            dv = tl.dot(tl.trans(weights).to(do.dtype), do, dv, input_precision="ieee")
            raised = tl.dot(do, tl.trans(v), input_precision="ieee") - pull[:, None]
            inner = (weights * raised * (1 - bent * bent)).to(q.dtype)
            dk = tl.dot(tl.trans(inner), q, dk, input_precision="ieee")
            start += BLOCK_M
        head += 1
    _store(dk_ptr + key * width, columns, of_k, width, known, dk * scale, BLOCK_D)
    _store(dv_ptr + key * width, columns, of_k, width, known, dv, BLOCK_D)


class CappedAttention(torch.autograd.Function):
    """q (N, H, D), k and v (N, K, D), all tokens end to end, contiguous -> (N, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor,
        scale: float, cap: float,
    ) -> Tensor:  # fmt: skip
        tokens, heads, width = q.shape
        o = torch.empty_like(q)
        sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        m, n, layout = _layout(q)
        _forward[(triton.cdiv(tokens, m), heads)](
            q, k, v, o, sums, first, tokens, heads, k.shape[1], width, scale, cap,
            FAR=FAR, BLOCK_M=m, BLOCK_N=n, **layout,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, sums, first, last)
        ctx.numbers = scale, cap
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, sums, first, last = ctx.saved_tensors
        scale, cap = ctx.numbers
        (tokens, heads, width), keys = q.shape, k.shape[1]
        do, pulls = grads[0].contiguous(), torch.empty_like(sums)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        m, n, layout = _layout(q)
        _backward_q[(triton.cdiv(tokens, m), heads)](
            q, k, v, o, do, dq, sums, pulls, first, tokens, heads, keys, width, scale, cap,
            BLOCK_M=m, BLOCK_N=n, **layout,
        )  # fmt: skip
        # two sums stay in registers here: the smaller block is the keys'
        _backward_kv[(triton.cdiv(tokens, n), keys)](
            q, k, v, do, dk, dv, sums, pulls, first, last, tokens, heads, keys, width, scale, cap,
            BLOCK_M=n, BLOCK_N=n, **layout,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


def _layout(q: Tensor) -> tuple[int, int, dict[str, int]]:
    """Return a program's queries and keys, and how it is compiled."""
    padded = max(16, triton.next_power_of_2(q.shape[-1]))
    if not q.is_cuda:
        return INTERPRETED, INTERPRETED, {"BLOCK_D": padded}
    # the way back holds queries, their pulls, keys and values at once
    row = 2 * padded * q.element_size()
    room = SHARED if torch.cuda.get_device_capability(q.device) in ROOMY else SHARED_ELSEWHERE
    m, n = next((m, n) for m, n in BLOCKS if (m + n) * row <= room)
    return m, n, {"BLOCK_D": padded, "num_warps": 8 if padded > 64 else 4, "num_stages": 1}


def attend(
    q: Tensor, k: Tensor, v: Tensor, reach: tuple[Tensor, Tensor], scale: float, cap: float
) -> Tensor:
    """See `capped_attention.attend_capped`."""
    rows, heads, length, width = q.shape
    ends = (
        x.transpose(1, 2).reshape(rows * length, x.shape[1], width).contiguous() for x in (q, k, v)
    )
    found = CappedAttention.apply(*ends, *reach, scale, cap)
    return found.view(rows, length, heads, width)  # type: ignore[no-any-return]
