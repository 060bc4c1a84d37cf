"""Llama with linear attention biases instead of rotary positions: the body of Baichuan-13B.

A head with slope s adds s * (key index - query index) to its scores (Press et al., ALiBi, 2022).
The distance is relative, so packed segments need no positions of their own: inside a segment it is
the distance of indices, and the mask forbids everything else.

Shapes: B = rows, H = heads, Q = queries, K = keys (cached ones first).
"""

from __future__ import annotations

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


def biased_mask(
    mask: Mask, heads: int, n_queries: int, n_keys: int, like: torch.Tensor
) -> torch.Tensor:
    """Return what is added to the attention scores.

    Args:
        mask: None; (B, K) with 0 at padding; or (B, 1, Q, K), bool or added to the scores.
        heads: H.
        n_queries: Q; the queries are the last of the keys.
        n_keys: K.
        like: a tensor of the wanted type and device.

    Returns:
        (B or 1, H, Q, K). Built in float32: bfloat16 cannot hold the index of a far key.
    """
    keys = torch.arange(n_keys, device=like.device)
    distance = keys - keys[n_keys - n_queries :].unsqueeze(1)  # (Q, K), 0 or less where seen
    allowed = (distance <= 0)[None, None]
    added: torch.Tensor | float = 0.0
    if mask is not None and mask.dim() == 2:
        allowed = allowed & mask[:, None, None, :].bool()
    elif mask is not None and mask.dtype is torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        added = mask
    rows = 1 if mask is None else mask.shape[0]
    steep = torch.tensor(slopes(heads), device=like.device).view(1, heads, 1, 1)
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
        n_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = attention_mask
        if kwargs.get("packed") is None:  # otherwise layers bias their scores themselves
            mask = biased_mask(
                attention_mask,
                self.config.num_attention_heads,
                n_queries,
                n_past + n_queries,
                inputs_embeds,
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
