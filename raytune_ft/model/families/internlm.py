"""InternLM, first generation (2023): a Llama whose attention may have biases.

Tensor names are Llama's. `bias` in config.json (true for 7B, false for 20B) puts biases on q, k,
v and o alike. Files of the 7B carry rotary buffers that every reader computes anew.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families.family import ConfigJson, Family, stored_dtype

# Defaults of the model's own configuration class; its files state only what differs.
DEFAULTS: ConfigJson = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def matches(config: ConfigJson) -> bool:
    """Tell whether config.json is of the first generation; a later 20B calls itself llama."""
    return config.get("model_type") == "internlm"


def translate(config: ConfigJson) -> Any:
    """Build the equal LlamaConfig.

    `rotary` of later files asks for dynamic scaling beyond the trained length; within it, which
    is all that is used here, that is the plain rotary embedding.
    """
    from transformers import LlamaConfig

    rotary = config.get("rotary") or {}
    return LlamaConfig(
        **{key: config.get(key, default) for key, default in DEFAULTS.items()},
        attention_bias=config.get("bias", True),
        rope_parameters={"rope_type": "default", "rope_theta": float(rotary.get("base", 10000))},
        dtype=stored_dtype(config, "float16"),
    )


def network(_config: Any) -> Any:
    """Return the Llama network."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


FAMILY = Family(
    name="internlm",
    matches=matches,
    translate=translate,
    network=network,
    spare_keys=("rotary_emb.inv_freq",),
)
