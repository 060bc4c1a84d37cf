"""Baichuan 7B and 13B, Baichuan2 7B and 13B: Llamas with fused attention.

All four say `model_type: baichuan`. The 13B models have ALiBi instead of rotary positions: their
config.json knows `model_max_length` but no `max_position_embeddings`. Baichuan2 has a NormHead,
which its vocabulary alone tells. Where the signs disagree the model is refused: a wrong guess would
load without a word and answer nonsense.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families import layouts
from raytune_ft.model.families.family import (
    ConfigJson,
    ContradictionError,
    Demand,
    Family,
    read,
    stored_dtype,
)

FIRST_CLASS = "BaiChuanForCausalLM"
"""How Baichuan-7B alone spells its class."""
SIZE_7B, SIZE_13B = (4096, 32), (5120, 40)
"""(hidden_size, num_attention_heads)."""
WORDS_1, WORDS_2 = 64000, 125696
ADDED_WORDS = 1024
"""A fine-tune may have appended so many words."""

DEMANDS = (
    Demand(
        "quantizer",
        "the weights are quantised already; take the model in 16 bits and set model.quantization",
        allowed=(None,),
    ),
)


def is_baichuan(config: ConfigJson) -> bool:
    """Tell whether config.json is of any of the four."""
    return config.get("model_type") == "baichuan"


def has_alibi(config: ConfigJson) -> bool:
    """Tell whether the model is a 13B; ContradictionError if its fields disagree."""
    size = (config.get("hidden_size"), config.get("num_attention_heads"))
    by_length = "max_position_embeddings" not in config
    by_size = None if size not in (SIZE_7B, SIZE_13B) else size == SIZE_13B
    by_class = False if FIRST_CLASS in (config.get("architectures") or ()) else None
    if any(sign not in (None, by_length) for sign in (by_size, by_class)):
        found = "absent, as in a 13B" if by_length else "present, as in a 7B"
        raise ContradictionError(
            f"max_position_embeddings: {found}, but hidden_size {size[0]}, num_attention_heads "
            f"{size[1]} and architectures are of the other size; restore the model's own file"
        )
    return by_length


def has_norm_head(config: ConfigJson) -> bool:
    """Tell whether the model is a Baichuan2; ContradictionError if that cannot be told."""
    words = int(config.get("vocab_size", WORDS_1))
    is_first = FIRST_CLASS in (config.get("architectures") or ())
    if WORDS_2 <= words < WORDS_2 + ADDED_WORDS:
        if is_first:
            raise ContradictionError(
                f"vocab_size: {words} is Baichuan2's, but architectures names {FIRST_CLASS}, "
                "which is Baichuan-7B; restore the model's own file"
            )
        return True
    if is_first or words < WORDS_1 + ADDED_WORDS:
        return False
    raise ContradictionError(
        f"vocab_size: {words} is neither Baichuan's {WORDS_1} nor Baichuan2's {WORDS_2}, so it "
        "cannot be told whether the output head is normalised; take a model with one of them"
    )


def translate(config: ConfigJson) -> Any:
    """Build the equal LlamaConfig; for a 13B its rotary part stays unused."""
    from transformers import LlamaConfig

    values = read(
        config,
        vocab_size=(WORDS_1, "vocab_size"),
        hidden_size=(4096, "hidden_size"),
        intermediate_size=(11008, "intermediate_size"),
        num_hidden_layers=(32, "num_hidden_layers"),
        num_attention_heads=(32, "num_attention_heads"),
        hidden_act=("silu", "hidden_act"),
        rms_norm_eps=(1e-6, "rms_norm_eps"),
        initializer_range=(0.02, "initializer_range"),
        max_position_embeddings=(4096, "max_position_embeddings", "model_max_length"),
        tie_word_embeddings=(False, "tie_word_embeddings"),
        pad_token_id=(0, "pad_token_id"),
        bos_token_id=(1, "bos_token_id"),
        eos_token_id=(2, "eos_token_id"),
    )
    rotary = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000))}
    return LlamaConfig(**values, rope_parameters=rotary, dtype=stored_dtype(config, "bfloat16"))


def _family(name: str, network: str, *, alibi: bool, norm_head: bool) -> Family:
    def matches(config: ConfigJson) -> bool:
        return is_baichuan(config) and (has_alibi(config), has_norm_head(config)) == (
            alibi,
            norm_head,
        )

    def find_network(_config: Any) -> Any:
        from raytune_ft.model.families import networks

        return getattr(networks, network)

    return Family(
        name=name,
        matches=matches,
        translate=translate,
        network=find_network,
        layout=layouts.BAICHUAN,
        demands=DEMANDS,
        spare_keys=("rotary_emb.inv_freq",),
        normalised_head=norm_head,
        no_native_form=(
            "no network of transformers has Baichuan-13B's linear attention biases (ALiBi)"
            if alibi
            else ""
        ),
    )


FAMILIES = (
    _family("baichuan-7b", "BaichuanNetwork", alibi=False, norm_head=False),
    _family("baichuan2-7b", "Baichuan2Network", alibi=False, norm_head=True),
    _family("baichuan-13b", "BaichuanAlibiNetwork", alibi=True, norm_head=False),
    _family("baichuan2-13b", "Baichuan2AlibiNetwork", alibi=True, norm_head=True),
)
