"""Attention of packed rows: queries, keys and values in, each sample's attention to itself out.

Rows lie end to end, and bounds in them isolate samples and rows alike.

Shapes: B = rows, H = query heads, K = key heads, L = tokens of a row, D = width of a head,
S = segments of all rows.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Let each token attend to the earlier tokens of its own segment, itself included.

    Args:
        q: (B, H, L, D).
        k: (B, K, L, D); H is a multiple of K.
        v: like `k`.
        cu_seqlens: (S + 1,), int32, on the device: bounds of segments in the B * L tokens end to
            end, from 0 to B * L, padding included; each row's end is one. Empty segments may
            follow at the end, so that the tensor keeps its size.
        max_seqlen: the longest segment's tokens or more; a number of the host.
        scale: factor of the scores.
        window: tokens that one sees, itself included; None for all.
        alibi_slopes: (H,), added to the scores times (key index - query index).
        mask: what `mask_of` makes of the same arguments, for the ways that need one; None makes
            it anew.

    Returns:
        (B, L, H, D), contiguous, as transformers' attention functions do.
    """
    if mask is None:
        mask = mask_of(
            q.shape[0], q.shape[2], cu_seqlens, q.dtype, window=window, alibi_slopes=alibi_slopes
        )
    return reference_attend(q, k, v, mask, scale=scale)


def mask_of(
    rows: int,
    length: int,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return what is added to scores: (B, 1 or H, L, L), 0 or the bias where attention is allowed.

    Made once per micro-batch in the type of the scores: kernels would turn booleans into numbers
    in every layer anew.
    """
    places = torch.arange(rows * length, device=cu_seqlens.device)
    # the number of bounds up to a place is its segment's number; empty segments count for none
    segments = torch.searchsorted(cu_seqlens[1:], places, right=True).view(rows, length)
    steps = torch.arange(length, device=cu_seqlens.device)
    distance = steps.unsqueeze(1) - steps
    allowed = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed.unsqueeze(1)
    added = torch.zeros((), dtype=torch.float32, device=cu_seqlens.device)
    if alibi_slopes is not None:
        added = alibi_slopes.to(distance.device, torch.float32).view(1, -1, 1, 1) * -distance
    return torch.where(allowed, added, -torch.inf).to(dtype)


def reference_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Do what `attend` does by torch's scaled dot products with a mask (B, 1 or H, L, L)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return found.transpose(1, 2).contiguous()
