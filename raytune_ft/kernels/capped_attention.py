"""Attention whose scores are capped, for packed rows: Gemma 2's, which torch's kernels lack.

score = cap * tanh(scale * q k / cap), then as in `attention`. Written down, the scores of a layer
are H x L x L numbers several times over; the Triton form keeps none of them and looks at the keys
of a token's own segment and window alone (Dao, FlashAttention-2, 2023).

Shapes: B = rows, H = query heads, K = key heads, L = tokens of a row, D = width of a head,
S = segments of all rows.
"""

from __future__ import annotations

import torch

from raytune_ft.kernels.attention import mask_of
from raytune_ft.kernels.launch import has_triton

Tensor = torch.Tensor
Reach = tuple[Tensor, Tensor]
"""Of each token of B * L, int32: the first key that it sees, and the first query behind it that
does not see it."""


def attend_capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    cap: float,
    window: int | None = None,
    reach: Reach | None = None,
) -> Tensor:
    """Let each token attend to the earlier tokens of its own segment, itself included.

    Args:
        q: (B, H, L, D), D <= 256.
        k: (B, K, L, D); H is a multiple of K.
        v: like `k`.
        cu_seqlens: (S + 1,), bounds of segments in the B * L tokens end to end.
        scale: factor of the scores, before the cap.
        cap: largest score.
        window: tokens that one sees, itself included; None for all.
        reach: what `reach_of` makes of the same arguments; None makes it anew.

    Returns:
        (B, L, H, D), contiguous.
    """
    if has_triton(q) and q.dtype is not torch.float64:
        from raytune_ft.kernels import capped_attention_triton

        if reach is None:
            reach = reach_of(q.shape[0] * q.shape[2], cu_seqlens, window)
        return capped_attention_triton.attend(q, k, v, reach, scale, cap)
    return reference_attend_capped(q, k, v, cu_seqlens, scale=scale, cap=cap, window=window)


def reach_of(tokens: int, cu_seqlens: Tensor, window: int | None) -> Reach:
    """Return which keys each of the tokens sees, and which queries see it; made once a batch."""
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:], place, right=True)
    first, last = cu_seqlens[segment], cu_seqlens[segment + 1]
    if window is not None:
        first = torch.maximum(first, place - (window - 1))
        last = torch.minimum(last, place + window)
    return first.int(), last.int()


def reference_attend_capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    cap: float,
    window: int | None = None,
) -> Tensor:
    """Do what `attend_capped` does by torch's own operators, all scores written down."""
    rows, _, length, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.tanh((q @ k.transpose(2, 3)).to(wide) * (scale / cap)) * cap
    scores = scores + mask_of(rows, length, cu_seqlens, wide, window=window)
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2).contiguous()
