"""Rotary positions: queries and keys in, both rotated out (Su et al., RoFormer, 2021).

Transformers' layouts. Half rotation (Llama and most): dimension i turns with i + R/2. Interleaved
(GLM): 2i turns with 2i + 1. Dimensions from R on pass as they are (partial rotary).

Shapes: B = rows, H = query heads, K = key heads, L = tokens, D = width of a head, R = rotated
dimensions of it.
"""

from __future__ import annotations

import torch

from raytune_ft.kernels.launch import has_triton

Tensor = torch.Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; out of place.

    Args:
        q: (B, H, L, D).
        k: (B, K, L, D).
        cos: (B or 1, L, R) as transformers' rotary embeddings give it, in any float type: the
            second half repeats the first. It gets no gradient.
        sin: like `cos`.
        interleaved: neighbours turn together.

    Returns:
        Both rotated, in shape and type as given; of transposed (B, L, H, D) memory, which kernels
        for packed rows read without a copy.
    """
    if has_triton(q) and q.dtype is not torch.float64:
        from raytune_ft.kernels import rope_triton

        return rope_triton.rope(q, k, cos, sin, interleaved)
    return reference_rope(q, k, cos, sin, interleaved=interleaved)


def reference_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Do what `rope` does by torch's own operators."""
    half = cos.shape[-1] // 2
    # (B, 1, L, R/2): one angle serves a pair of dimensions
    cosine, sine = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    return _rotated(q, cosine, sine, interleaved), _rotated(k, cosine, sine, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined.to(x.dtype), rest), -1) if rest.shape[-1] else joined.to(x.dtype)
