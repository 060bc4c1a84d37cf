"""Attention of packed rows: queries, keys and values in, each sample's attention to itself out.

Rows lie end to end, and bounds in them isolate samples and rows alike. On a GPU torch's own
kernels do the work: flash attention by bounds, cuDNN's where each row is one sample; a mask that
all layers share where neither can, and on the CPU.

Shapes: B = rows, H = query heads, K = key heads, L = tokens of a row, D = width of a head,
S = segments of all rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor

HEADS_AT_ONCE = 8
"""Heads whose float32 biases exist together: 40 of 4,096 tokens would be 2.7 GB."""
WIDEST_HEAD = 256
"""Flash attention's limit; widths must also be multiples of 8."""
CUDNN_STEP = 128
"""cuDNN makes a plan for every new length, 150 ms: only lengths that come again are its own."""


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
    dropout: float = 0.0,
) -> Tensor:
    """Let each token attend to the earlier tokens of its own segment, itself included.

    Nothing here waits for the device.

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
        dropout: probability with which a weight of a key is dropped, drawn from torch's own
            generator; 0 while evaluating.

    Returns:
        (B, L, H, D), contiguous, as transformers' attention functions do.
    """
    rows, _, length, _ = q.shape
    if needs_mask(q, cu_seqlens, max_seqlen, window=window, alibi_slopes=alibi_slopes):
        if mask is None:
            mask = mask_of(
                rows, length, cu_seqlens, q.dtype, window=window, alibi_slopes=alibi_slopes
            )
        return reference_attend(q, k, v, mask, scale=scale, dropout=dropout)
    if _are_whole(rows, cu_seqlens, max_seqlen, window):
        return _whole_rows(q, k, v, scale, dropout)
    return _by_bounds(q, k, v, cu_seqlens, max_seqlen, scale, window, dropout)


def needs_mask(
    q: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
) -> bool:
    """Tell whether `attend` with these arguments reads a mask, which is then best made once."""
    if alibi_slopes is not None:
        return True
    return not (_are_whole(len(q), cu_seqlens, max_seqlen, window) or _takes_bounds(q))


def _are_whole(rows: int, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> bool:
    return len(cu_seqlens) == rows + 1 and (window is None or window >= max_seqlen)


def _takes_bounds(q: Tensor) -> bool:
    width = q.shape[-1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    # its backward pass at 193 to 224 wants a data centre's GPU
    fits = width % 8 == 0 and width <= WIDEST_HEAD and not 192 < width <= 224
    return half and fits and q.is_cuda and _has_flash(q.device)


@cache
def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def mask_of(
    rows: int,
    length: int,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return what is added to scores: (B, 1 or H, L, L), 0 or a bias where attention is allowed.

    Made once per micro-batch in the type of the scores: kernels would turn booleans into numbers
    in every layer anew.
    """
    device = cu_seqlens.device
    places = torch.arange(rows * length, device=device, dtype=cu_seqlens.dtype)
    # a place's segment is the number of ends up to it; empty segments lie behind all places
    segments = torch.searchsorted(cu_seqlens[1:], places, right=True).view(rows, length)
    steps = torch.arange(length, device=device)
    distance = steps.unsqueeze(1) - steps  # query minus key
    allowed = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    hidden = ~allowed.unsqueeze(1)
    heads = 1 if alibi_slopes is None else len(alibi_slopes)
    # torch copies a mask whose rows do not begin at multiples of 16, in every layer again
    wide = -(-length // 16) * 16
    mask = torch.zeros(rows, heads, length, wide, dtype=dtype, device=device)[..., :length]
    if alibi_slopes is None:
        return mask.masked_fill_(hidden, -torch.inf)
    steep = alibi_slopes.to(device, torch.float32).view(1, -1, 1, 1)
    for start in range(0, heads, HEADS_AT_ONCE):
        some = slice(start, start + HEADS_AT_ONCE)
        # in float32: bfloat16 cannot hold the index of a far key
        mask[:, some] = (steep[:, some] * -distance).masked_fill(hidden, -torch.inf)
    return mask


def reference_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Do what `attend` does by torch's scaled dot products with a mask (B, 1 or H, L, L)."""
    k, v = _for_every_query(q, k, v)
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout
    )
    return found.transpose(1, 2).contiguous()


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if q.shape[2] % CUDNN_STEP == 0 and not dropout:
        kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
    if not _takes_bounds(q):  # nor groups: torch would write the scores down
        k, v = _for_every_query(q, k, v)
    arguments: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    with sdpa_kernel(kernels, set_priority=True):
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, **arguments
        )
    return found.transpose(1, 2).contiguous()


def _by_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    rows, heads, length, width = q.shape
    ends = (x.transpose(1, 2).reshape(rows * length, x.shape[1], width) for x in (q, k, v))
    # torch.nn.attention.varlen calls this operator too, by wrappers in Python that cost more
    # time than the kernel, and with other arguments in each release
    found = torch.ops.aten._flash_attention_forward(
        *ends,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout,
        True,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    return found.view(rows, length, heads, width)  # type: ignore[no-any-return]


def _for_every_query(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
