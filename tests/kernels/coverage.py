"""The table of docs/fast-path.md: `python -m tests.kernels.coverage` writes it anew.

Every family that is shipped is made tiny, gets an adapter on all its linear layers and the fast
path, and is asked part by part what computes it. Families with files of their own are read from
tiny files; the others are made from their model cards, all sizes cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from raytune_ft.config import catalog
from raytune_ft.model.fast import Report, _layers, install
from raytune_ft.model.fastpath import attention, blocks, linears
from raytune_ft.model.loss import TokenLoss, _is_matrix, causal_model
from tests.kernels.installed import CPU, NATIVE, network, with_adapter

PAGE = Path(__file__).parents[2] / "docs" / "fast-path.md"
BEGIN, END = "<!-- made by tests/kernels/coverage.py -->\n", "<!-- end -->\n"
FILES = {
    "internlm": ("internlm",), "chatglm": ("chatglm",), "qwen": ("qwen",), "yi": ("yi",),
    "baichuan": ("baichuan-7b", "baichuan2-7b", "baichuan-13b", "baichuan2-13b"),
    "starcoder": ("starcoder",),
}  # fmt: skip
"""Families of configs/families.yaml with tiny files of tests/model/families.py."""
BESIDE = ("Gemma", "Mixtral")
"""Networks that no card has."""
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
HEADINGS = (
    "family", "network", "norms", "rotation", "attention", "MLP's middle", "linear layers", "head"
)  # fmt: skip

Made = tuple[str, Any, Report]


def table() -> str:
    """Return the table in Markdown."""
    rows: dict[tuple[str, ...], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, model, report in _models(Path(folder)):
            rows.setdefault(_cells(model, report), []).append(title)
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for cells, titles in rows.items():
        lines.append((", ".join(dict.fromkeys(titles)), *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _models(folder: Path) -> Iterator[Made]:
    """Yield each family's title, a model of it, and what was installed."""
    seen = set()
    for name in catalog.models():
        card = catalog.card(name)
        title = catalog.families()[card.family].title
        if card.family in FILES:
            continue
        config = _cut(card.config)
        if (key := (card.family, str(config))) not in seen:
            seen.add(key)
            torch.manual_seed(0)
            yield _installed(title, transformers.AutoModelForCausalLM.from_config(config))
    for family, files in FILES.items():
        for file in files:
            yield _installed(catalog.families()[family].title, network(file, folder))
    for name in BESIDE:
        assert name in NATIVE
        yield _installed(name, network(name, folder))


def _cut(shape: dict[str, Any]) -> Any:
    heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    few = max(1, SIZES["num_attention_heads"] * keys // heads)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = {**shape, **ids, **SIZES, "num_key_value_heads": few}
    return transformers.AutoConfig.for_model(given.pop("model_type"), **given)


def _installed(title: str, model: Any) -> Made:
    model = with_adapter(model.requires_grad_(False))
    return title, model, install(model, CPU, True)


def _cells(model: Any, report: Report) -> tuple[str, ...]:
    network = causal_model(model)
    layer = _layers(network.base_model)[-1]
    known = [base.__name__ for base in type(network).__mro__ if "transformers" in base.__module__]
    return (
        known[0].removesuffix("ForCausalLM").removesuffix("LMHeadModel"),
        _norms(layer),
        *_attention(layer, network.config.get_text_config()),
        _middle(layer),
        _linears(network),
        _head(TokenLoss(model, report)),
    )


def _norms(layer: Any) -> str:
    forms = [m.__dict__[blocks.NORM] for m in layer.modules() if blocks.NORM in m.__dict__]
    if not forms:
        return "plain"
    kind = "LayerNorm" if forms[0].centred else "RMSNorm"
    kind += ", 1 + w" if forms[0].offset else ""
    return kind + (" with the sum" if blocks.LAYER in layer.__dict__ else ", sums plain")


def _attention(layer: Any, config: Any) -> tuple[str, str]:
    block = next(getattr(layer, name) for name in ("self_attn", "attn") if hasattr(layer, name))
    form: attention.Form | None = block.__dict__.get(attention.FORM)
    if form is None:
        return "plain", "plain"
    rotation = {"none": "learned positions"}.get(form.kind.rotary, form.kind.rotary)
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", 1.0) if "rope_type" in rope else 1.0
    if share != 1.0 and form.kind.rotary != "none":
        rotation += f", {share:g} of a head"
    how = ["mask of ALiBi" if form.slopes is not None else "bounds"]
    how += ["window"] * _has_window(config) + ["norms of q and k"] * hasattr(block, "q_norm")
    how += ["capped scores"] * bool(getattr(form, "cap", None))
    how += [f"dropout {form.dropout:g}"] * bool(form.dropout)
    return "ALiBi" if form.slopes is not None else rotation, ", ".join(how)


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    wide = getattr(config, "sliding_window", None) is not None
    return wide and (not kinds or "sliding_attention" in kinds)


def _middle(layer: Any) -> str:
    form: blocks.MlpForm | None = getattr(layer, "mlp", nn.Module()).__dict__.get(blocks.MLP)
    if form is None:
        return "plain"
    if form.activation is None:
        return "no gate: torch's own"
    gate = {"silu": "SiLU", "gelu_tanh": "GELU"}[form.activation]
    return f"{gate}, {'one product' if len(form.inputs) == 1 else 'two products'}"


def _linears(network: nn.Module) -> str:
    adapted = [m for m in network.modules() if linears.is_lora(m)]
    fast = sum(linears.PART in m.__dict__ for m in adapted)
    return "all" if fast == len(adapted) else f"{fast} of {len(adapted)}"


def _head(loss: TokenLoss) -> str:
    head = causal_model(loss.model).get_output_embeddings()
    if not (_is_matrix(head) and (loss._plain_head or loss._cap is not None)):
        return "plain"
    return "in place" if loss._cap is None else f"in place, capped at {loss._cap:g}"


def written() -> str:
    """Return the page with its table made anew."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written())
