"""The layouts of the families, from their checkpoints' own indexes.

Half the rows of `dense_h_to_4h` are the gate and half go up, in GLM's own order. In Qwen `w2` is
the gate: the original computes w1(x) * silu(w2(x)).
"""

from __future__ import annotations

from raytune_ft.model.families.layout import Layout, fused_qkv, renamed

_LAYER = "model.layers.{n}"
_ATTENTION = f"{_LAYER}.self_attn"

BAICHUAN = Layout((fused_qkv(f"{_ATTENTION}.W_pack", _ATTENTION),))

YI = Layout(
    (
        renamed(f"{_LAYER}.ln1", f"{_LAYER}.input_layernorm"),
        renamed(f"{_LAYER}.ln2", f"{_LAYER}.post_attention_layernorm"),
    )
)

_GLM = "transformer.encoder.layers.{n}"
CHATGLM = Layout(
    (
        renamed("transformer.embedding.word_embeddings", "model.embed_tokens"),
        renamed(f"{_GLM}.input_layernorm", f"{_LAYER}.input_layernorm"),
        renamed(f"{_GLM}.post_attention_layernorm", f"{_LAYER}.post_attention_layernorm"),
        fused_qkv(f"{_GLM}.self_attention.query_key_value", _ATTENTION),
        renamed(f"{_GLM}.self_attention.dense", f"{_ATTENTION}.o_proj"),
        renamed(f"{_GLM}.mlp.dense_h_to_4h", f"{_LAYER}.mlp.gate_up_proj"),
        renamed(f"{_GLM}.mlp.dense_4h_to_h", f"{_LAYER}.mlp.down_proj"),
        renamed("transformer.encoder.final_layernorm", "model.norm"),
        renamed("transformer.output_layer", "lm_head"),
    )
)

_QWEN = "transformer.h.{n}"
QWEN = Layout(
    (
        renamed("transformer.wte", "model.embed_tokens"),
        renamed(f"{_QWEN}.ln_1", f"{_LAYER}.input_layernorm"),
        renamed(f"{_QWEN}.ln_2", f"{_LAYER}.post_attention_layernorm"),
        fused_qkv(f"{_QWEN}.attn.c_attn", _ATTENTION),
        renamed(f"{_QWEN}.attn.c_proj", f"{_ATTENTION}.o_proj"),
        renamed(f"{_QWEN}.mlp.w2", f"{_LAYER}.mlp.gate_proj"),
        renamed(f"{_QWEN}.mlp.w1", f"{_LAYER}.mlp.up_proj"),
        renamed(f"{_QWEN}.mlp.c_proj", f"{_LAYER}.mlp.down_proj"),
        renamed("transformer.ln_f", "model.norm"),
    )
)
