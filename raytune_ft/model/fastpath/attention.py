"""Attention blocks: q, k and v in one step, rotated, attended within their segments, then o.

Classes stand here by name, each after a look at its forward pass; `proof` computes both forms once
more on the model that is loaded.

Shapes: B = rows, L = padded length, H = query heads, K = key heads, D = width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from raytune_ft.kernels.attention import attend
from raytune_ft.kernels.capped_attention import attend_capped
from raytune_ft.kernels.launch import multiplies_in_triton
from raytune_ft.kernels.rope import rope
from raytune_ft.model.fastpath.lane import Packed
from raytune_ft.model.fastpath.linears import OLD_GPU, outputs

FORM = "fast_attention"
"""Attribute of a block that takes part."""
CACHES = ("past_key_values", "layer_past")


@dataclass(frozen=True)
class Kind:
    """What a class computes beside Llama's attention."""

    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Its layers on the block's input."""
    output: str = "o_proj"
    rotary: Literal["half", "interleaved", "none"] = "half"


LLAMA = Kind()
GLM = Kind(rotary="interleaved")
KINDS = {
    "LlamaAttention": LLAMA,
    "MistralAttention": LLAMA,
    "MixtralAttention": LLAMA,
    "Qwen2Attention": LLAMA,
    "Qwen3Attention": LLAMA,
    "GemmaAttention": LLAMA,
    "Gemma2Attention": LLAMA,
    "Gemma3Attention": LLAMA,
    "GlmAttention": GLM,
    "Glm4Attention": GLM,
    "Phi3Attention": Kind(inputs=("qkv_proj",)),
    "GPTBigCodeAttention": Kind(inputs=("c_attn",), output="c_proj", rotary="none"),
}
"""Norms of queries and keys (`q_norm`, `k_norm`) belong to any of them."""


@dataclass(frozen=True)
class Form:
    """How a block computes in its fast form."""

    kind: Kind
    widths: list[int]
    """Columns of q, k and v."""
    scale: float
    window: int | None
    """Tokens that one sees, itself included."""
    slopes: torch.Tensor | None
    """(H,): biases by distance instead of rotary positions."""
    dropout: float
    """Of the weights of keys, in training."""
    cap: float | None
    """Of the scores."""


class FastAttention:
    """Form of an attention block."""

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, packed: Packed | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Return (B, L, width) and no scores; without `packed` the block's own way is gone."""
        if packed is None or any(kwargs.get(name) is not None for name in CACHES):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        form: Form = getattr(self, FORM)
        q, k, v = _heads(self, form, hidden_states)
        if form.kind.rotary != "none" and form.slopes is None:
            cos, sin = kwargs["position_embeddings"]
            q, k = rope(q, k, cos, sin, interleaved=form.kind.rotary == "interleaved")
        found = _attended(q, k, v, form, packed, form.dropout if self.training else 0.0)
        together = found.reshape(*hidden_states.shape[:-1], -1)
        result = outputs([getattr(self, form.kind.output)], together)[0]
        return (result if form.kind.output == "o_proj" else self.resid_dropout(result)), None


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, packed: Packed, dropout: float
) -> torch.Tensor:
    """Return (B, L, H, D)."""
    if form.cap is not None:
        return attend_capped(
            q, k, v, packed.cu_seqlens, scale=form.scale, cap=form.cap, window=form.window,
            reach=packed.reach(q, form.window),
        )  # fmt: skip
    return attend(
        q, k, v, packed.cu_seqlens, packed.max_seqlen, scale=form.scale, window=form.window,
        alibi_slopes=form.slopes, mask=packed.mask(q, form.window, form.slopes), dropout=dropout,
    )  # fmt: skip


def _heads(
    block: Any, form: Form, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q (B, H, L, D), k and v (B, K, L, D) of hidden states."""
    found = outputs([getattr(block, name) for name in form.kind.inputs], hidden)
    if len(found) == 1:
        found = list(torch.split(found[0], form.widths, dim=-1))
    q, k, v = (part.view(*part.shape[:-1], -1, block.head_dim) for part in found)
    if hasattr(block, "q_norm"):
        q, k = block.q_norm(q), block.k_norm(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def form_of(block: Any, config: Any, slopes: list[float] | None) -> Form | str:
    """Return a block's fast form, or why it has none.

    Args:
        block: of whatever class.
        config: of the language model.
        slopes: of its heads, where they are biased by distance.
    """
    kind = KINDS.get(type(block).__name__)
    if kind is None or not type(block).__module__.startswith("transformers.models."):
        return f"{type(block).__name__} has no fast form"
    refused = _refusal(block, config)
    if refused is not None:
        return refused
    queries = config.num_attention_heads * block.head_dim
    keys = _key_heads(block, config) * block.head_dim
    biases = None
    if slopes is not None:
        device = getattr(block, kind.output).weight.device
        biases = torch.tensor(slopes, dtype=torch.float32, device=device)
    rest = window_of(block, config), biases, _dropout(block), _cap(block)
    return Form(kind, [queries, keys, keys], block.scaling, *rest)


def _refusal(block: Any, config: Any) -> str | None:
    if _cap(block) is not None and _dropout(block):
        return f"capped scores with dropout {_dropout(block)} of attention weights"
    if _cap(block) is not None and not multiplies_in_triton(_device(block)):
        return OLD_GPU.format("capped scores")
    if not block.is_causal or getattr(block, "is_cross_attention", False):
        return "attention to later tokens"
    if type(block).__name__ == "GPTBigCodeAttention" and not block.multi_query:
        return "queries, keys and values are interleaved"
    return None


def _dropout(block: Any) -> float:
    found = getattr(block, "attention_dropout", getattr(block, "attn_dropout", 0.0))
    return float(found or 0.0)


def _device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def _cap(block: Any) -> float | None:
    found: float | None = getattr(block, "attn_logit_softcapping", None)
    return found


def _key_heads(block: Any, config: Any) -> int:
    return int(config.num_attention_heads // block.num_key_value_groups)


def window_of(block: Any, config: Any) -> int | None:
    """Return how many tokens one sees in a block, as `loss.Attention` masks them."""
    kinds = getattr(config, "layer_types", None)
    wide: int | None = getattr(config, "sliding_window", None)
    if not kinds:
        return wide
    return wide if kinds[block.layer_idx] == "sliding_attention" else None


def linears_of(block: nn.Module, form: Form) -> list[nn.Module]:
    """Return a block's linear layers."""
    return [getattr(block, name) for name in (*form.kind.inputs, form.kind.output)]
