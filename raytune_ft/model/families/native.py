"""Families that transformers ships: Llama, Qwen 2 and 3, Mistral, Gemma, Phi, StarCoder ..."""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families.family import ConfigJson, Family


def matches(config: ConfigJson) -> bool:
    """Tell whether transformers has a causal language model of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def translate(config: ConfigJson) -> Any:
    """Build the configuration; `auto_map`, a pointer to remote code, is left out."""
    from transformers import CONFIG_MAPPING

    values = {key: value for key, value in config.items() if key != "auto_map"}
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def network(config: Any) -> Any:
    """Return the causal language model class of a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


FAMILY = Family(
    name="native",
    matches=matches,
    translate=translate,
    network=network,
    # buffers that older releases of transformers stored
    spare_keys=("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"),
)
