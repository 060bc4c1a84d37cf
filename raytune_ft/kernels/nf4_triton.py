"""The Triton form of `nf4.dequantize`: words of eight weights in, 16 bytes a thread out."""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_ft.kernels.launch import ceil_div
from raytune_ft.kernels.nf4 import Nf4Weight

WORD = 8
"""Weights in 32 bits."""
WORDS = 512
"""Words of one program."""


def dequantize(weight: Nf4Weight, out: Tensor) -> Tensor:
    """Write a weight into `out`, contiguous and of the weight's shape and dtype."""
    n, packed, nested = weight.shape.numel(), weight.packed, weight.nested
    whole = packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0
    n_words = ceil_div(n, WORD)
    # without double quantisation the last four are placeholders that nothing reads
    inner = nested or weight
    _dequantize[(ceil_div(n_words, WORDS),)](
        packed.view(torch.int32) if whole else packed,
        weight.code,
        weight.absmax,
        inner.absmax,
        inner.code,
        weight.code if nested is None else nested.offset,
        out,
        n,
        n_words,
        packed.numel(),
        BLOCK=weight.blocksize // WORD,
        OUTER=1 if nested is None else nested.blocksize,
        NESTED=nested is not None,
        WHOLE=whole,
        EVEN=n % WORD == 0,
        WORDS=WORDS,
        enable_fp_fusion=False,  # bitsandbytes rounds the product of scales before it adds
    )
    return out


@triton.jit
def _dequantize(
    packed,
    code,
    absmax,
    outer_absmax,
    outer_code,
    offset,
    out,
    n,
    n_words,
    n_bytes,
    BLOCK: tl.constexpr,
    OUTER: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    WORDS: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    there = word < n_words
    if WHOLE:
        bits = tl.load(packed + word, mask=there, other=0)
    else:
        bits = _gathered(packed, word, n_bytes)
    block = word // BLOCK
    scale = tl.load(absmax + block, mask=there, other=0)
    if NESTED:
        outer = tl.load(outer_absmax + block // OUTER, mask=there, other=0.0)
        scale = tl.load(outer_code + scale.to(tl.int32)) * outer + tl.load(offset)
    place = tl.arange(0, 8)[None, :]
    # byte by byte, the high half of each first
    half = (bits[:, None] >> ((place ^ 1) * 4)) & 15
    value = tl.load(code + half) * scale[:, None]
    at = word[:, None] * 8 + place
    here = there[:, None] if EVEN else at < n
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _gathered(packed, word, n_bytes):
    """Return words out of bytes that do not fill the last one, or do not begin on a word."""
    bits = tl.zeros_like(word).to(tl.int32)
    for byte in tl.static_range(4):
        at = word * 4 + byte
        bits |= tl.load(packed + at, mask=at < n_bytes, other=0).to(tl.int32) << (8 * byte)
    return bits
