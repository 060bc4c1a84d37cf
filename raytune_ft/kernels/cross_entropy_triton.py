"""Cross entropy's Triton program and what launches it; `cross_entropy` says what it computes.

A program takes one row: once over it for the maximum and the sum of exponentials, rescaled as the
maximum grows (Milakov and Gimelshein, online softmax, 2018), once more for the gradient, mostly
out of the cache. Imported only where Triton runs.
"""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

LARGEST_BLOCK = 4096
WARPS = 8


@triton.jit
def _bent(x, cap, CAPS: tl.constexpr):
    if CAPS:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    return x


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, row_stride, cap, words: tl.constexpr,
    CAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    # read before the loops: the second one writes over it
    wanted = _bent(tl.load(logits_ptr + target).to(tl.float32), cap, CAPS)
    highest = -float("inf")
    total = 0.0
    for start in range(0, words, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < words, other=-float("inf"))
        # a capped -inf would be a number
        x = tl.where(columns < words, _bent(x.to(tl.float32), cap, CAPS), -float("inf"))
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        highest = higher
    normaliser = highest + tl.log(total)
    tl.store(losses_ptr + row, normaliser - wanted)
    for start in range(0, words, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < words
        x = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = _bent(x, cap, CAPS)
        gradient = tl.exp(x - normaliser) - tl.where(columns == target, 1.0, 0.0)
        if CAPS:
            gradient *= 1 - (x / cap) * (x / cap)
        tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def losses_and_gradient(
    logits: Tensor,
    targets: Tensor,
    cap: float | None = None,
    largest_block: int = LARGEST_BLOCK,
    warps: int = WARPS,
) -> Tensor:
    """Launch one program per row of logits (T, V); see `cross_entropy.losses_and_gradient`.

    A program reads `largest_block` words at a time by `warps` warps.
    """
    n_rows, words = logits.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        block = min(largest_block, triton.next_power_of_2(words))
        _cross_entropy_kernel[(n_rows,)](
            logits, targets, losses, logits.stride(0), cap or 1.0,
            words=words, CAPS=cap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses
