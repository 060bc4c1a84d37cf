"""Tiny random checkpoints in each family's original layout, for the tests of this folder.

Tensors are listed here by hand, name by name, so that nothing of the package decides what a
checkpoint looks like.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, LAYERS, MLP = 32, 4, 2, 48
LLAMA = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": MLP, "rms_norm_eps": 1e-6,
}  # fmt: skip
BAICHUAN = {**LLAMA, "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "internlm": {**LLAMA, "model_type": "internlm", "vocab_size": 96, "bias": True},
    "chatglm": {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "padded_vocab_size": 96,
        "hidden_size": HIDDEN, "num_layers": LAYERS, "num_attention_heads": HEADS,
        "kv_channels": 8, "multi_query_group_num": 2, "ffn_hidden_size": MLP, "seq_length": 128,
        "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False,
        "rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True,
        "apply_residual_connection_post_layernorm": False, "quantization_bit": 0,
        "pre_seq_len": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    },
    "qwen": {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 96,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "kv_channels": 8, "intermediate_size": 2 * MLP, "seq_length": 128, "no_bias": True,
        "rotary_pct": 1.0, "layer_norm_epsilon": 1e-6, "eos_token_id": 3,
    },
    "qwen-aug": {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "padded_vocab_size": 96,
        "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "ffn_hidden_size": 2 * MLP,
        "seq_length": 128, "layer_norm_epsilon": 1e-6, "eos_token_id": 3,
    },
    "baichuan-7b": {
        **BAICHUAN, "architectures": ["BaiChuanForCausalLM"], "vocab_size": 96,
        "max_position_embeddings": 128,
    },
    "baichuan2-7b": {
        **BAICHUAN, "vocab_size": 125696, "max_position_embeddings": 128, "model_max_length": 128,
    },
    "baichuan-13b": {**BAICHUAN, "vocab_size": 64000, "model_max_length": 128},
    "baichuan2-13b": {**BAICHUAN, "vocab_size": 125696, "model_max_length": 128},
    "yi": {
        **LLAMA, "model_type": "Yi", "architectures": ["YiForCausalLM"], "vocab_size": 96,
        "num_key_value_heads": 2, "rope_theta": 5e6,
    },
    "starcoder": {
        "model_type": "gpt_bigcode", "vocab_size": 96, "n_embd": HIDDEN, "n_layer": LAYERS,
        "n_head": HEADS, "n_positions": 128, "n_inner": MLP, "multi_query": True,
        "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
CONVERTED = [name for name in CONFIGS if name not in ("internlm", "starcoder")]
"""Families whose files have names of their own."""

QKV = 2 * HIDDEN
"""Rows of queries, keys and values with two key heads of four."""


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a family's checkpoint."""
    config = CONFIGS[name]
    words = config.get("vocab_size") or config.get("padded_vocab_size")
    assert words
    found: dict[str, tuple[int, ...]] = dict(OUTSIDE[name.partition("-")[0]](words))
    for number in range(LAYERS):
        found |= {key.format(n=number): shape for key, shape in layer(name).items()}
    return found


def _llama(words: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (words, HIDDEN), "lm_head.weight": (words, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }  # fmt: skip


OUTSIDE = {
    "internlm": _llama,
    "yi": _llama,
    "baichuan": _llama,
    "baichuan2": _llama,
    "chatglm": lambda words: {
        "transformer.embedding.word_embeddings.weight": (words, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (words, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (2,),
    },
    "qwen": lambda words: {
        "transformer.wte.weight": (words, HIDDEN), "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (words, HIDDEN),
    },
    "starcoder": lambda words: {
        "transformer.wte.weight": (words, HIDDEN), "transformer.wpe.weight": (128, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,), "transformer.ln_f.bias": (HIDDEN,),
    },
}  # fmt: skip


def layer(name: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer; `{n}` is its number."""
    square, wide, narrow = (HIDDEN, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)
    at = "model.layers.{n}."
    llama: dict[str, tuple[int, ...]] = {
        at + "self_attn.o_proj.weight": square, at + "mlp.gate_proj.weight": wide,
        at + "mlp.up_proj.weight": wide, at + "mlp.down_proj.weight": narrow,
        at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    if name.startswith("baichuan"):
        return {**llama, at + "self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN)}
    if name == "internlm":
        weights = {f"{at}self_attn.{part}_proj.weight": square for part in "qkvo"}
        biases = {f"{at}self_attn.{part}_proj.bias": (HIDDEN,) for part in "qkvo"}
        return {**llama, **weights, **biases, at + "self_attn.rotary_emb.inv_freq": (4,)}
    if name == "yi":
        norms = {at + "ln1.weight": (HIDDEN,), at + "ln2.weight": (HIDDEN,)}
        keys = {f"{at}self_attn.{part}_proj.weight": (HIDDEN // 2, HIDDEN) for part in "kv"}
        kept = {key: shape for key, shape in llama.items() if "layernorm" not in key}
        return {**kept, **norms, **keys, at + "self_attn.q_proj.weight": square}
    if name == "chatglm":
        at = "transformer.encoder.layers.{n}."
        return {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "post_attention_layernorm.weight": (HIDDEN,),
            at + "self_attention.query_key_value.weight": (QKV, HIDDEN),
            at + "self_attention.query_key_value.bias": (QKV,),
            at + "self_attention.dense.weight": square,
            at + "mlp.dense_h_to_4h.weight": (2 * MLP, HIDDEN),
            at + "mlp.dense_4h_to_h.weight": narrow,
        }
    at = "transformer.h.{n}."
    if name == "starcoder":
        linear = {
            "attn.c_attn": (HIDDEN + 2 * HIDDEN // HEADS, HIDDEN), "attn.c_proj": square,
            "mlp.c_fc": wide, "mlp.c_proj": narrow,
        }  # fmt: skip
        both = {f"{at}{key}.weight": shape for key, shape in linear.items()}
        both |= {f"{at}{key}.bias": shape[:1] for key, shape in linear.items()}
        ends = {f"{at}ln_{i}.{end}": (HIDDEN,) for i in (1, 2) for end in ("weight", "bias")}
        return {**both, **ends}
    return {
        at + "ln_1.weight": (HIDDEN,), at + "ln_2.weight": (HIDDEN,),
        at + "attn.c_attn.weight": (3 * HIDDEN, HIDDEN), at + "attn.c_attn.bias": (3 * HIDDEN,),
        at + "attn.c_proj.weight": square, at + "mlp.w1.weight": wide, at + "mlp.w2.weight": wide,
        at + "mlp.c_proj.weight": narrow,
    }  # fmt: skip


def tensors(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors; those of norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * 0.2
        + float(len(shape) == 1 and key.endswith("weight"))
        for key, shape in shapes(name).items()
    }


def make(name: str, folder: Path, *, pickled: bool = False, shards: int = 1) -> Path:
    """Write a checkpoint; with several shards, neighbours in a layer lie in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    found = tensors(name)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    if shards == 1:
        names = [f"{stem}.{suffix}"]
    else:
        weight_map = {key: names[i % shards] for i, key in enumerate(found)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    for i, file in enumerate(names):
        part = {key: found[key] for key in list(found)[i::shards]}
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    return folder
