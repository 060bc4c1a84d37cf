"""Yi, first release (November 2023): a Llama whose norms are called ln1 and ln2.

Later revisions of the same models are plain Llama checkpoints, which the native family reads.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families import layouts
from raytune_ft.model.families.family import ConfigJson, Family, stored_dtype

DEFAULTS: ConfigJson = {
    "vocab_size": 64000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def matches(config: ConfigJson) -> bool:
    """Tell whether config.json is of the first release."""
    return config.get("model_type") == "Yi"


def translate(config: ConfigJson) -> Any:
    """Build the equal LlamaConfig."""
    from transformers import LlamaConfig

    theta = float(config.get("rope_theta", 5_000_000))
    return LlamaConfig(
        **{key: config.get(key, default) for key, default in DEFAULTS.items()},
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        dtype=stored_dtype(config, "bfloat16"),
    )


def network(_config: Any) -> Any:
    """Return Llama under the first release's tensor names."""
    from raytune_ft.model.families.networks import YiNetwork

    return YiNetwork


FAMILY = Family(
    name="yi",
    matches=matches,
    translate=translate,
    network=network,
    layout=layouts.YI,
    spare_keys=("rotary_emb.inv_freq",),
)
