"""Qwen, first generation, both revisions of its config.json: the Qwen2 network.

August 2023 used GPT-2's field names, September its own. `intermediate_size` counts gate and up
together. The context is `seq_length`: beyond it the original rescales attention while answering,
never while training, and that is not computed here.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families import layouts
from raytune_ft.model.families.family import ConfigJson, Demand, Family, read, stored_dtype

_OTHER_BLOCK = "such a block is not computed; take Qwen-7B, -14B, -72B, -1.8B or their fine-tunes"
_PICTURES = "the model sees pictures or hears; take the text model of the same size"

END_OF_TEXT = 151643
"""`<|endoftext|>`, which not every revision's config.json names."""

DEMANDS = (
    Demand("visual", _PICTURES, allowed=(None,)),
    Demand("audio", _PICTURES, allowed=(None,)),
    Demand("rotary_pct", _OTHER_BLOCK, allowed=(1,)),
    Demand("no_bias", _OTHER_BLOCK, allowed=(True,)),
    Demand("scale_attn_weights", _OTHER_BLOCK, allowed=(True,)),
)


def matches(config: ConfigJson) -> bool:
    """Tell whether config.json is of the first generation."""
    return config.get("model_type") == "qwen"


def translate(config: ConfigJson) -> Any:
    """Build the equal Qwen2Config."""
    from transformers import Qwen2Config

    values = read(
        config,
        vocab_size=(151936, "vocab_size", "padded_vocab_size"),
        hidden_size=(4096, "hidden_size", "n_embd"),
        num_hidden_layers=(32, "num_hidden_layers", "n_layer"),
        num_attention_heads=(32, "num_attention_heads", "n_head"),
        rms_norm_eps=(1e-6, "layer_norm_epsilon"),
        max_position_embeddings=(8192, "seq_length"),
        initializer_range=(0.02, "initializer_range"),
        tie_word_embeddings=(False, "tie_word_embeddings"),
        pad_token_id=(None, "pad_token_id"),
        bos_token_id=(None, "bos_token_id"),
        eos_token_id=(None, "eos_token_id"),
    )
    if values["eos_token_id"] is None and values["vocab_size"] > END_OF_TEXT:
        values["eos_token_id"] = END_OF_TEXT
    doubled = read(config, width=(22016, "intermediate_size", "ffn_hidden_size"))["width"]
    theta = float(config.get("rotary_emb_base", 10000))
    heads = values["num_attention_heads"]
    return Qwen2Config(
        **values,
        num_key_value_heads=heads,
        head_dim=config.get("kv_channels", values["hidden_size"] // heads),
        intermediate_size=doubled // 2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        use_sliding_window=False,
        dtype=stored_dtype(config, "bfloat16"),
    )


def network(_config: Any) -> Any:
    """Return Qwen2 under the first generation's tensor names."""
    from raytune_ft.model.families.networks import QwenNetwork

    return QwenNetwork


FAMILY = Family(
    name="qwen",
    matches=matches,
    translate=translate,
    network=network,
    layout=layouts.QWEN,
    demands=DEMANDS,
    spare_keys=("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"),
)
