"""Llama with linear attention biases instead of rotary positions: the body of Baichuan-13B.

A head with slope s adds s * (key index - query index) to its scores (Press et al., ALiBi, 2022).
The distance is relative, so packed segments need no positions of their own: inside a segment it is
the distance of indices, and the mask forbids everything else.

Shapes: B = rows, H = heads, Q = queries, K = keys (cached ones first).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaModel

Mask = torch.Tensor | None

HEADS_AT_ONCE = 8
"""Heads whose float32 biases exist together: 40 of 4,096 tokens would be 2.7 GB."""


def slopes(heads: int) -> list[float]:
    """Return the slope of each head, from steep to flat.

    A power of two gives 2^(-8/n), 2^(-16/n) ... 2^-8; other numbers take the next lower power's
    series and, for the heads beyond, every second slope of the next higher power's.
    """
    power = 1 << (heads.bit_length() - 1)
    series = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    extra = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return series + extra


@cache
def _slopes_on(heads: int, device: torch.device) -> torch.Tensor:
    """Return the slopes as (1, H, 1, 1), moved to a device once: a CUDA graph cannot do that."""
    return torch.tensor(slopes(heads), device=device).view(1, heads, 1, 1)


def biased_mask(
    mask: Mask,
    heads: int,
    n_queries: int,
    n_keys: int,
    like: torch.Tensor,
    n_past: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what is added to the attention scores.

    Args:
        mask: None; (B, K) with 0 at padding; or (B, 1, Q, K), bool or added to the scores.
        heads: H.
        n_queries: Q.
        n_keys: K.
        like: a tensor of the wanted type and device.
        n_past: keys before the first query; none: the queries are the last of the keys. Or (B, Q):
            each query's place among the keys of its own row.

    Returns:
        (B or 1, H, Q, K). Built in float32: bfloat16 cannot hold the index of a far key.
    """
    keys = torch.arange(n_keys, device=like.device)
    first = n_keys - n_queries if n_past is None else n_past
    if isinstance(first, torch.Tensor) and first.dim() == 2:
        distance = (keys - first.unsqueeze(-1)).unsqueeze(1)  # (B, 1, Q, K)
    else:
        queries = torch.arange(n_queries, device=like.device) + first
        distance = (keys - queries.unsqueeze(1))[None, None]
    allowed = distance <= 0  # seen
    added: torch.Tensor | float = 0.0
    if mask is not None and mask.dim() == 2:
        allowed = allowed & mask[:, None, None, :].bool()
    elif mask is not None and mask.dtype is torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        added = mask
    rows = 1 if mask is None else mask.shape[0]
    steep = _slopes_on(heads, like.device)
    lowest = torch.finfo(like.dtype).min
    result = like.new_empty(rows, heads, n_queries, n_keys)
    for start in range(0, heads, HEADS_AT_ONCE):
        some = slice(start, start + HEADS_AT_ONCE)
        bias = (steep[:, some] * distance + added).masked_fill(~allowed, lowest)
        # a padded query sees nothing: all its scores are equally low, never NaN
        result[:, some] = bias.clamp_(min=lowest)
    return result


class AlibiLlamaModel(LlamaModel):  # type: ignore[misc]
    """Llama's layers with ALiBi; position ids are not looked at.

    The mask takes B * H * Q * K elements and is shared by all layers.
    """

    # flash attention takes no mask of scores, and flex attention wants a function
    _supports_flash_attn = False
    _supports_flex_attn = False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run Llama's layers under the biased mask; see `LlamaModel.forward`."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        n_queries = inputs_embeds.shape[1]
        n_past, n_keys = 0, n_queries
        if past_key_values is not None:  # one of fixed size holds more keys than are past
            # rows side by side have a place each (`model.lanes`)
            places = getattr(past_key_values, "places", None)
            n_past = past_key_values.get_seq_length() if places is None else places
            n_keys, _ = past_key_values.get_mask_sizes(n_queries, 0)
        mask = attention_mask
        if kwargs.get("packed") is None:  # otherwise layers bias their scores themselves
            mask = biased_mask(
                attention_mask,
                self.config.num_attention_heads,
                n_queries,
                n_keys,
                inputs_embeds,
                n_past,
            )
        # position 0 everywhere: cosine 1 and sine 0, so Llama's rotation does nothing
        still = torch.zeros(1, n_queries, dtype=torch.long, device=inputs_embeds.device)
        return super().forward(
            attention_mask=mask,
            position_ids=still,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
