"""ChatGLM2-6B and ChatGLM3-6B: the GLM network of transformers, rotary halves included.

ChatGLM2 computes its rotary frequencies in the weights' type, ChatGLM3 in float32; this is
ChatGLM3's way for both.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.model.families import layouts
from raytune_ft.model.families.family import ConfigJson, Demand, Family, read, stored_dtype

_OTHER_BLOCK = "such a block is not computed; take chatglm2-6b, chatglm3-6b or their fine-tunes"
_FIRST = "this is ChatGLM-6B of the first generation, which is not read; take chatglm2-6b or later"

DEMANDS = (
    Demand("position_encoding_2d", _FIRST, allowed=(False,)),
    Demand("inner_hidden_size", _FIRST, allowed=()),
    Demand(
        "quantization_bit",
        "the weights are quantised already; take the model in 16 bits and set model.quantization",
        allowed=(0, None),
    ),
    Demand(
        "pre_seq_len",
        "a trained prefix (P-tuning) belongs to this model and is not read; merge or drop it",
        allowed=(0, None),
    ),
    Demand(
        "vision_config",
        "the model sees pictures (GLM-4V); take the text model",
        allowed=(None,),
    ),
    Demand("add_bias_linear", _OTHER_BLOCK, allowed=(False,)),
    Demand("rmsnorm", _OTHER_BLOCK, allowed=(True,)),
    Demand("post_layer_norm", _OTHER_BLOCK, allowed=(True,)),
    Demand("apply_residual_connection_post_layernorm", _OTHER_BLOCK, allowed=(False,)),
    Demand("multi_query_attention", _OTHER_BLOCK, allowed=(True,)),
    Demand(
        "padded_vocab_size",
        "this is GLM-4; take its release in the glm format (glm-4-9b-chat-hf)",
        forbidden=(151552,),
    ),
)


def matches(config: ConfigJson) -> bool:
    """Tell whether config.json calls itself ChatGLM."""
    return config.get("model_type") == "chatglm"


def translate(config: ConfigJson) -> Any:
    """Build the equal GlmConfig; its defaults are GLM-4's, so every value is set."""
    from transformers import GlmConfig

    values = read(
        config,
        vocab_size=(65024, "padded_vocab_size", "vocab_size"),
        hidden_size=(4096, "hidden_size"),
        num_hidden_layers=(28, "num_layers", "num_hidden_layers"),
        num_attention_heads=(32, "num_attention_heads"),
        num_key_value_heads=(2, "multi_query_group_num"),
        head_dim=(128, "kv_channels"),
        intermediate_size=(13696, "ffn_hidden_size"),
        rms_norm_eps=(1e-5, "layernorm_epsilon"),
        max_position_embeddings=(8192, "seq_length"),
        attention_bias=(True, "add_qkv_bias"),
        attention_dropout=(0.0, "attention_dropout"),
        tie_word_embeddings=(False, "tie_word_embeddings"),
        pad_token_id=(0, "pad_token_id"),
        bos_token_id=(1, "bos_token_id"),
        eos_token_id=(2, "eos_token_id"),
    )
    rotary = {
        "rope_type": "default",
        "rope_theta": 10000.0 * float(config.get("rope_ratio", 1)),
        "partial_rotary_factor": 0.5,
    }
    return GlmConfig(**values, rope_parameters=rotary, dtype=stored_dtype(config, "float16"))


def network(_config: Any) -> Any:
    """Return GLM under ChatGLM's tensor names."""
    from raytune_ft.model.families.networks import ChatGLMNetwork

    return ChatGLMNetwork


FAMILY = Family(
    name="chatglm",
    matches=matches,
    translate=translate,
    network=network,
    layout=layouts.CHATGLM,
    demands=DEMANDS,
    spare_keys=("rotary_pos_emb.inv_freq",),
)
