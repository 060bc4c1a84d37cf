"""Answering: a loaded model in, the same with fewer launches for each token out.

One token of a 7B reads 13.5 GB of weights, 4.5 ms on an H100, and starts some 40 kernels a layer,
which take as long again, replayed from a graph too. Here norms, rotary positions and the middle of
MLPs are one kernel each, those of training; caches, masks and attention stay transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raytune_ft.kernels.norm import rms_norm
from raytune_ft.kernels.rope import rope
from raytune_ft.model.fastpath.attention import KINDS, Kind
from raytune_ft.model.fastpath.blocks import MlpForm, NormForm, gated, mlp_form, norm_form
from raytune_ft.model.fastpath.lane import turn_back, turn_into
from raytune_ft.model.generate import device_of
from raytune_ft.model.lanes import model_dtype

FORM = "answering_form"
"""Attribute of a module that takes part."""
PROBE = (3, 10, 17, 24, 31, 38, 45)
CLOSE = {torch.float32: 1e-3}
CLOSE_IN_HALVES = 0.1
"""Share of the logits' spread by which both ways may differ (root mean squares): roundings of all
layers in another order; a wrong rotation or norm makes it 1 and more."""


class AnsweringNorm:
    """Form of an RMSNorm."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normed rows."""
        form: NormForm = getattr(self, FORM)
        return rms_norm(hidden_states, self.weight, form.eps, offset=form.offset)


class AnsweringMlp:
    """Form of a gated MLP."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x))."""
        form: Any = getattr(self, FORM)  # of an MLP with a gate: `_take`
        found = [getattr(self, name)(x) for name in form.inputs]
        return getattr(self, form.output)(gated(found, form.activation))  # type: ignore[no-any-return]


class AnsweringAttention:
    """Form of an attention block with rotary positions."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (B, L, width), and the scores where transformers' attention gives them."""
        if position_embeddings is None or torch.is_grad_enabled():
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        kind: Kind = getattr(self, FORM)
        q, k, v = _heads(self, kind, hidden_states)
        cos, sin = position_embeddings
        q, k = rope(q, k, cos, sin, interleaved=kind.rotary == "interleaved")
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # windows are in the mask
        found, scores = sdpa_attention_forward(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        together = found.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return getattr(self, kind.output)(together), scores


def _heads(block: Any, kind: Kind, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return q (B, H, L, D), k and v (B, K, L, D) of hidden states (B, L, width)."""
    found = [getattr(block, name)(hidden) for name in kind.inputs]
    if len(found) == 1:
        queries = block.config.num_attention_heads * block.head_dim
        keys = queries // block.num_key_value_groups
        found = list(torch.split(found[0], [queries, keys, keys], dim=-1))
    q, k, v = (part.view(*part.shape[:-1], -1, block.head_dim) for part in found)
    if hasattr(block, "q_norm"):
        q, k = block.q_norm(q), block.k_norm(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def quicken(model: nn.Module) -> str | None:
    """Let a model's modules answer with fewer launches, where that gives the same answers.

    Args:
        model: loaded, in evaluation; its own weights and names stay.

    Returns:
        Why it stays as it was; None if it answers in its new forms.
    """
    before = _logits(model)
    changed = [module for module in model.modules() if _take(module)]
    if not changed:
        return "no module of it has another form"
    try:
        far = float((_logits(model) - before).norm() / (before - before.mean()).norm())
    except Exception as error:  # a compiler's have no common type, and plain answers are there
        far, why = float("inf"), f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        why = f"its answers would differ by {far:.1e}"
    if far <= CLOSE.get(model_dtype(model), CLOSE_IN_HALVES):
        return None
    for module in changed:
        turn_back(module)
        del module.__dict__[FORM]
    return why


def _take(module: nn.Module) -> bool:
    """Give a module its form, if it has one."""
    norm = norm_form(module)
    if norm is not None and not norm.centred:
        return _turned(module, AnsweringNorm, norm)
    mlp = mlp_form(module)
    if isinstance(mlp, MlpForm) and mlp.activation is not None:
        return _turned(module, AnsweringMlp, mlp)
    kind = KINDS.get(type(module).__name__)
    if kind is not None and kind.rotary != "none" and _is_plain(module):
        return _turned(module, AnsweringAttention, kind)
    return False


def _turned(module: Any, form: type, numbers: Any) -> bool:
    module.__dict__[FORM] = numbers
    turn_into(module, form)
    return True


def _is_plain(block: Any) -> bool:
    """Tell whether a block does nothing but what `AnsweringAttention` does."""
    own = type(block).__module__.startswith("transformers.models.")
    capped = getattr(block, "attn_logit_softcapping", None) is not None
    return own and not capped and block.config._attn_implementation == "sdpa"


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int] = PROBE) -> torch.Tensor:
    """Return float32 logits (L, V) of a few tokens."""
    words = model.get_input_embeddings().weight.shape[0]
    given = torch.tensor([[one % words for one in ids]], device=device_of(model))
    logits: torch.Tensor = model(input_ids=given, use_cache=False).logits[0]
    return logits.float()
