"""MLPs, norms and whole decoder layers in their fast form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ft.kernels.layer_norm import add_layer_norm
from raytune_ft.kernels.norm import add_rms_norm, rms_norm
from raytune_ft.kernels.swiglu import Activation, fused_swiglu, swiglu
from raytune_ft.model.fastpath.lane import LANE, Packed
from raytune_ft.model.fastpath.linears import outputs

NORM, MLP, LAYER = "fast_norm", "fast_mlp", "fast_layer"
"""Attributes of modules that take part."""
TILE = 8192
"""Tokens of an MLP at a time where there are many."""
LONG = 2 * TILE
"""Tokens of a micro-batch up to which an MLP takes them at once. What it keeps beyond is the most
of what a layer keeps, and in contexts so long attention takes the time."""

LLAMA_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Phi3")
) | {"GlmRMSNorm", "Glm4RMSNorm"}  # fmt: skip
GEMMA_NORMS = frozenset(f"Gemma{number}RMSNorm" for number in ("", "2", "3"))
MLPS = frozenset(
    f"{family}MLP"
    for family in (
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Glm", "Glm4", "Phi3",
    )
)  # fmt: skip
ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class NormForm:
    """Numbers of a norm."""

    eps: float
    offset: float = 0.0
    """That its weights lack."""
    centred: bool = False
    """A LayerNorm; alone it keeps torch's own form, which is one launch."""


class FastNorm:
    """Form of an RMSNorm."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normed rows."""
        if not LANE.is_fast:
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        form: NormForm = getattr(self, NORM)
        return rms_norm(hidden_states, self.weight, form.eps, offset=form.offset)


def norm_form(norm: Any) -> NormForm | None:
    """Return the numbers of a norm of a known class."""
    if type(norm).__name__ in LLAMA_NORMS:
        return NormForm(norm.variance_epsilon)
    if type(norm).__name__ in GEMMA_NORMS:
        return NormForm(norm.eps, 1.0)
    if type(norm) is nn.LayerNorm and norm.weight is not None and norm.weight.ndim == 1:
        return NormForm(norm.eps, centred=True)
    return None


def _add_norm(
    norm: Any, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed sum, and the sum."""
    form: NormForm = getattr(norm, NORM)
    if form.centred:
        return add_layer_norm(x, residual, norm.weight, norm.bias, form.eps)
    return add_rms_norm(x, residual, norm.weight, form.eps, offset=form.offset)


@dataclass(frozen=True)
class MlpForm:
    """Layers of an MLP."""

    inputs: tuple[str, ...]
    """Gate and up, or both in one, or the first of two without a gate."""
    activation: Activation | None
    """Of the gate; None where there is none: its own module is one launch."""
    output: str = "down_proj"


class FastMlp:
    """Form of an MLP."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x)), or down(act(up(x))) and its dropout."""
        if not LANE.is_fast:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if x.shape[:-1].numel() > LONG and torch.is_grad_enabled():
            return _tiled(self._fast_forward, x)
        return self._fast_forward(x)  # type: ignore[no-any-return]

    def _fast_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        form: MlpForm = getattr(self, MLP)
        found = outputs([getattr(self, name) for name in form.inputs], x)
        if form.activation is None:
            return self.dropout(outputs([getattr(self, form.output)], self.act(found[0]))[0])  # type: ignore[no-any-return]
        return outputs([getattr(self, form.output)], gated(found, form.activation))[0]


def gated(found: Sequence[torch.Tensor], activation: Activation) -> torch.Tensor:
    """Return act(gate) * up of what an MLP's first layers gave, apart or in one."""
    if len(found) == 1:
        return fused_swiglu(found[0], activation=activation)
    return swiglu(found[0], found[1], activation=activation)


def _tiled(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run an MLP on `TILE` tokens after the other, and again so in the backward pass."""

    def run(tile: torch.Tensor, packed: Packed | None) -> torch.Tensor:
        if packed is None:
            return mlp(tile)
        with LANE.within(packed):
            return mlp(tile)

    outer, found = LANE.packed, []
    for number, tile in enumerate(torch.split(x.reshape(-1, x.shape[-1]), TILE)):
        # each tile counts its rows from 0: under one seed all would drop the same
        packed = None if outer is None else outer.reseeded(number)
        found.append(checkpoint(run, tile, packed, use_reentrant=False))
    return torch.cat(found).view(*x.shape[:-1], -1)


def mlp_form(mlp: Any) -> MlpForm | str:
    """Return an MLP's fast form, or why it has none."""
    if type(mlp).__name__ == "GPTBigCodeMLP":
        return MlpForm(("c_fc",), None, "c_proj")
    if type(mlp).__name__ not in MLPS:
        return f"{type(mlp).__name__} has no fast form"
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    activation = ACTIVATIONS.get(type(act).__name__)
    if activation is None:
        return f"activation {type(act).__name__}"
    fused = hasattr(mlp, "gate_up_proj")
    return MlpForm(("gate_up_proj",) if fused else ("gate_proj", "up_proj"), activation)


def mlp_linears(mlp: nn.Module, form: MlpForm) -> list[nn.Module]:
    """Return an MLP's linear layers."""
    return [getattr(mlp, name) for name in (*form.inputs, form.output)]


@dataclass(frozen=True)
class LayerForm:
    """Names of a decoder layer's attention and norms."""

    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    attention: str = "self_attn"
    before_attention: str = "input_layernorm"


LAYERS = {
    f"{family}DecoderLayer": LayerForm()
    for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma", "Glm", "Phi3")
} | {
    f"Gemma{number}DecoderLayer": LayerForm(
        "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    )
    for number in (2, 3)
}
LAYERS["Glm4DecoderLayer"] = LayerForm(
    "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
)
LAYERS["GPTBigCodeBlock"] = LayerForm("ln_2", attention="attn", before_attention="ln_1")


class FastLayer:
    """Form of a decoder layer; the norm before its MLP adds up its input itself."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output (B, L, width)."""
        packed: Packed | None = kwargs.get("packed")
        if packed is None or any(one is not None for one in (*args, kwargs.get("layer_past"))):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc, no-any-return]
        with LANE.within(packed):
            return self._fast_forward(hidden_states, kwargs)  # type: ignore[no-any-return]

    def _fast_forward(
        self: Any, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        form: LayerForm = getattr(self, LAYER)
        normed = getattr(self, form.before_attention)(hidden_states)
        found, _ = getattr(self, form.attention)(hidden_states=normed, **kwargs)
        if form.after_attention is not None:
            found = getattr(self, form.after_attention)(found)
        normed, total = _add_norm(getattr(self, form.before_mlp), found, hidden_states)
        found = self.mlp(normed)
        if form.after_mlp is not None:
            found = getattr(self, form.after_mlp)(found)
        return total + found  # type: ignore[no-any-return]


def layer_form(layer: Any) -> LayerForm | str:
    """Return a decoder layer's fast form, or why it has none."""
    form = LAYERS.get(type(layer).__name__)
    if form is None:
        return f"{type(layer).__name__} has no fast form"
    for name in ("resid_attn_dropout", "resid_mlp_dropout"):
        p = getattr(getattr(layer, name, None), "p", 0.0)
        if p:
            return f"dropout {p} of the residual stream"
    if hasattr(layer, "crossattention"):
        return "attention to another sequence"
    return form if hasattr(getattr(layer, form.before_mlp), NORM) else "norms without a fast form"
