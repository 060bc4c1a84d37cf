"""Tiny checkpoints in the layouts in which the families were published in 2023.

In: a family's name. Out: a folder with the original's config.json fields, tensor names and
shapes, index files, and a tokenizer in its real file form (`vocabularies`). Only sizes differ.

Weights are drawn with sigma 0.2, so that logits reach several units and a swapped tensor shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.families import vocabularies

Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]

SIGMA = 0.2
BAICHUAN2_WORDS = 125_696  # the one value that tells Baichuan2 from Baichuan
WINDOW = 8
WITHOUT_NATIVE_FORM = ("baichuan_13b", "baichuan2_13b")


@dataclass(frozen=True)
class Spec:
    """One family: what its config.json says, what its files hold."""

    config: Config
    shapes: Callable[[Config], Shapes]
    vocabulary: Callable[[Path], int]
    card: str
    """Model card whose template and end of answer the family is trained with."""


def make(
    family: str,
    folder: Path,
    *,
    shards: int = 1,
    fmt: Literal["safetensors", "bin"] = "safetensors",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[Weights], Weights] = dict,
    **changes: Any,
) -> Path:
    """Write a random checkpoint of `family` into `folder` and return it.

    Args:
        family: a key of SPECS.
        folder: made if it is not there.
        shards: weight files; names are dealt out in turn, so that the parts of one layer, and
            of one fused tensor's surroundings, lie in different files.
        fmt: safetensors, or torch's pickled tensors.
        seed: of the weights.
        dtype: of the weights, also named in config.json.
        edit: gets the float32 weights and returns those to write.
        changes: fields of config.json that differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = SPECS[family]
    spec.vocabulary(folder)
    config = spec.config | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    write_json(folder / "config.json", config)
    weights = {name: w.to(dtype) for name, w in edit(draw(spec.shapes(config), seed)).items()}
    if fmt == "bin" and config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # pickles kept both
    write_weights(folder, weights, shards, fmt)
    return folder


def weights_of(family: str, seed: int = 0, **changes: Any) -> Weights:
    """Return the float32 tensors that `make` writes."""
    spec = SPECS[family]
    return draw(spec.shapes(spec.config | changes), seed)


def draw(shapes: Shapes, seed: int) -> Weights:
    """Draw tensors by name; norms are near 1, `inv_freq` is what each family's file holds."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("inv_freq"):
            half = shape[0]
            weights[name] = 10000.0 ** (-torch.arange(half) / half)
            continue
        tensor = torch.randn(shape, generator=generator) * SIGMA
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = tensor + 1 if is_norm else tensor
    return weights


def write_weights(folder: Path, weights: Weights, shards: int, fmt: str) -> None:
    stem, suffix = ("model", "safetensors") if fmt == "safetensors" else ("pytorch_model", "bin")
    save: Callable[..., None] = save_file if fmt == "safetensors" else torch.save
    if shards == 1:
        save(weights, folder / f"{stem}.{suffix}")
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: weights[name] for name in sorted(weights)[i::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


# Tensor names and shapes, family by family.


def llama_shapes(c: Config) -> Shapes:
    """Llama, InternLM, Mistral and the later Yi; `bias` as InternLM has it."""
    h, mlp = c["hidden_size"], c["intermediate_size"]
    d = h // c["num_attention_heads"]
    kv = c.get("num_key_value_heads", c["num_attention_heads"]) * d
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for part, rows in (("q", h), ("k", kv), ("v", kv), ("o", h)):
            shapes[f"{at}self_attn.{part}_proj.weight"] = (rows, h)
            if c.get("bias"):
                shapes[f"{at}self_attn.{part}_proj.bias"] = (rows,)
        shapes |= _gated_mlp(at, h, mlp) | _two_norms(at, h)
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}


def with_inv_freq(shapes: Callable[[Config], Shapes]) -> Callable[[Config], Shapes]:
    """Add the rotary buffers that the early pickles carry."""

    def added(c: Config) -> Shapes:
        half = c["hidden_size"] // c["num_attention_heads"] // 2
        buffers = {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (half,)
            for i in range(c["num_hidden_layers"])
        }
        return shapes(c) | buffers

    return added


def yi_first_shapes(c: Config) -> Shapes:
    """Yi's first release: Llama but for the names of the two norms of a layer."""
    return {
        name.replace("post_attention_layernorm", "ln2").replace("input_layernorm", "ln1"): shape
        for name, shape in llama_shapes(c).items()
    }


def baichuan_shapes(c: Config) -> Shapes:
    """q, k and v as one tensor, no biases."""
    h, mlp = c["hidden_size"], c["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes[f"{at}self_attn.W_pack.weight"] = (3 * h, h)
        shapes[f"{at}self_attn.o_proj.weight"] = (h, h)
        shapes |= _gated_mlp(at, h, mlp) | _two_norms(at, h)
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}


def chatglm_shapes(c: Config) -> Shapes:
    """GLM names; q has all heads, k and v have `multi_query_group_num`."""
    h, mlp, words = c["hidden_size"], c["ffn_hidden_size"], c["padded_vocab_size"]
    fused = h + 2 * c["multi_query_group_num"] * c["kv_channels"]
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (words, h),
        "transformer.rotary_pos_emb.inv_freq": (c["kv_channels"] // 4,),
    }
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        shapes |= _two_norms(at, h)
        shapes[f"{at}self_attention.query_key_value.weight"] = (fused, h)
        shapes[f"{at}self_attention.query_key_value.bias"] = (fused,)
        shapes[f"{at}self_attention.dense.weight"] = (h, h)
        shapes[f"{at}mlp.dense_h_to_4h.weight"] = (2 * mlp, h)
        shapes[f"{at}mlp.dense_4h_to_h.weight"] = (h, mlp)
    shapes["transformer.encoder.final_layernorm.weight"] = (h,)
    return shapes | {"transformer.output_layer.weight": (words, h)}


def qwen_shapes(c: Config) -> Shapes:
    """GPT-2 names; the file's feed-forward size is twice the real width."""
    new = "hidden_size" in c
    h, layers = c["hidden_size" if new else "n_embd"], c["num_hidden_layers" if new else "n_layer"]
    words = c["vocab_size" if new else "padded_vocab_size"]
    mlp = c["intermediate_size" if new else "ffn_hidden_size"] // 2
    shapes: Shapes = {"transformer.wte.weight": (words, h)}
    for i in range(layers):
        at = f"transformer.h.{i}."
        shapes |= {f"{at}ln_1.weight": (h,), f"{at}ln_2.weight": (h,)}
        shapes |= {f"{at}attn.c_attn.weight": (3 * h, h), f"{at}attn.c_attn.bias": (3 * h,)}
        shapes[f"{at}attn.c_proj.weight"] = (h, h)
        shapes |= {f"{at}mlp.w1.weight": (mlp, h), f"{at}mlp.w2.weight": (mlp, h)}
        shapes[f"{at}mlp.c_proj.weight"] = (h, mlp)
    return shapes | {"transformer.ln_f.weight": (h,), "lm_head.weight": (words, h)}


def starcoder_shapes(c: Config) -> Shapes:
    """GPT-2 names, one key and value head, biases everywhere, head tied to the embedding."""
    h, mlp = c["n_embd"], c["n_inner"]
    fused = h + 2 * (h // c["n_head"])
    shapes: Shapes = {
        "transformer.wte.weight": (c["vocab_size"], h),
        "transformer.wpe.weight": (c["n_positions"], h),
    }
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        linears = {"attn.c_attn": (fused, h), "attn.c_proj": (h, h)}
        linears |= {"mlp.c_fc": (mlp, h), "mlp.c_proj": (h, mlp)}
        for name, shape in linears.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}{norm}.weight": (h,), f"{at}{norm}.bias": (h,)}
    return shapes | {"transformer.ln_f.weight": (h,), "transformer.ln_f.bias": (h,)}


def _gated_mlp(at: str, h: int, mlp: int) -> Shapes:
    return {
        f"{at}mlp.gate_proj.weight": (mlp, h),
        f"{at}mlp.down_proj.weight": (h, mlp),
        f"{at}mlp.up_proj.weight": (mlp, h),
    }


def _two_norms(at: str, h: int) -> Shapes:
    return {f"{at}input_layernorm.weight": (h,), f"{at}post_attention_layernorm.weight": (h,)}


# config.json, field by field as the hub's files have them.


def code(module: str, model: str, *classes: str) -> Config:
    """Return `architectures` and `auto_map` of a model that came with its own code."""
    network = f"modeling_{module}.{model}"
    auto = {"AutoConfig": f"configuration_{module}.{classes[0]}"}
    return {
        "architectures": [classes[1] if len(classes) > 1 else model],
        "auto_map": auto | dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), network),
    }


COMMON: Config = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "hidden_act": "silu",
    "num_attention_heads": 4, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "vocab_size": 512,
    "transformers_version": "4.33.1",
}  # fmt: skip

INTERNLM: Config = COMMON | code("internlm", "InternLMForCausalLM", "InternLMConfig") | {
    "model_type": "internlm", "bias": True, "pad_token_id": 2, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA: Config = COMMON | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pad_token_id": 0,
    "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA2: Config = COMMON | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "num_key_value_heads": 4, "pretraining_tp": 1,
    "rope_scaling": None,
}  # fmt: skip
MISTRAL: Config = COMMON | {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": WINDOW,
}  # fmt: skip
BAICHUAN_7B: Config = COMMON | code(
    "baichuan", "BaiChuanForCausalLM", "BaiChuanConfig"
) | {"model_type": "baichuan", "pad_token_id": 0, "max_position_embeddings": 4096}  # fmt: skip
BAICHUAN2_7B: Config = COMMON | code("baichuan", "BaichuanForCausalLM", "BaichuanConfig") | {
    "model_type": "baichuan", "pad_token_id": 0, "max_position_embeddings": 4096,
    "model_max_length": 4096, "z_loss_weight": 0, "vocab_size": BAICHUAN2_WORDS,
    "hidden_size": 32, "intermediate_size": 64, "tokenizer_class": "BaichuanTokenizer",
}  # fmt: skip
# ALiBi is told from the missing max_position_embeddings, so any number of heads can be small;
# 5 is no power of two, as the original's 40 is not.
BAICHUAN_13B: Config = {
    k: v for k, v in COMMON.items() if k != "max_position_embeddings"
} | code("baichuan", "BaichuanForCausalLM", "BaichuanConfig") | {
    "model_type": "baichuan", "_from_model_config": True, "gradient_checkpointing": False,
    "model_max_length": 4096, "pad_token_id": 0, "hidden_size": 80, "num_attention_heads": 5,
}  # fmt: skip
BAICHUAN2_13B: Config = BAICHUAN_13B | {
    "z_loss_weight": 0, "vocab_size": BAICHUAN2_WORDS, "hidden_size": 40,
    "tokenizer_class": "BaichuanTokenizer",
}  # fmt: skip
CHATGLM: Config = code(
    "chatglm", "ChatGLMForConditionalGeneration", "ChatGLMConfig", "ChatGLMModel"
) | {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "ffn_hidden_size": 128, "fp32_residual_connection": False, "hidden_dropout": 0.0,
    "hidden_size": 64, "kv_channels": 16, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 4, "num_layers": 2, "original_rope": True,
    "padded_vocab_size": 512, "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192,
    "use_cache": True, "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
    "transformers_version": "4.30.2",
}  # fmt: skip
QWEN: Config = code("qwen", "QWenLMHeadModel", "QWenConfig") | {
    "model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0,
    "fp16": False, "fp32": False, "hidden_size": 64, "intermediate_size": 256,
    "initializer_range": 0.02, "kv_channels": 16, "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768, "no_bias": True, "num_attention_heads": 4,
    "num_hidden_layers": 2, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": 512, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True,
    "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 640,
}  # fmt: skip
QWEN_AUG: Config = code("qwen", "QWenLMHeadModel", "QWenConfig") | {
    "model_type": "qwen", "activation": "swiglu", "apply_residual_connection_post_layernorm": False,
    "attn_pdrop": 0.0, "bf16": False, "bias_dropout_fusion": True, "embd_pdrop": 0.0,
    "ffn_hidden_size": 256, "fp16": False, "fp32": False, "initializer_range": 0.02,
    "kv_channels": 16, "layer_norm_epsilon": 1e-06, "n_embd": 64, "n_head": 4, "n_inner": None,
    "n_layer": 2, "n_positions": 6144, "no_bias": True, "onnx_safe": None,
    "padded_vocab_size": 640, "params_dtype": "torch.bfloat16", "pos_emb": "rotary",
    "resid_pdrop": 0.1, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
    "seq_length": 512, "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0", "use_cache": True, "use_dynamic_ntk": True,
    "use_flash_attn": True, "use_logn_attn": True, "vocab_size": 640,
}  # fmt: skip
YI: Config = COMMON | {
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000000.0, "pad_token_id": 0,
    "max_position_embeddings": 4096,
}  # fmt: skip
STARCODER: Config = {
    "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"],
    "activation_function": "gelu", "attention_softmax_in_fp32": True, "attn_pdrop": 0.1,
    "bos_token_id": 0, "embd_pdrop": 0.1, "eos_token_id": 0, "inference_runner": 0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "max_batch_size": None,
    "max_sequence_length": None, "multi_query": True, "n_embd": 64, "n_head": 4, "n_inner": 128,
    "n_layer": 2, "n_positions": 512, "pad_key_length": True, "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "transformers_version": "4.28.1",
    "tie_word_embeddings": True, "use_cache": True, "validate_runner_input": True,
    "vocab_size": 512,
}  # fmt: skip

SPECS: dict[str, Spec] = {
    "internlm_7b": Spec(
        INTERNLM, with_inv_freq(llama_shapes), vocabularies.internlm, "internlm_7b"
    ),
    "internlm_20b": Spec(
        INTERNLM | {"bias": False}, llama_shapes, vocabularies.internlm, "internlm_20b"
    ),
    "llama": Spec(LLAMA, with_inv_freq(llama_shapes), vocabularies.llama, "llama_7b"),
    "llama2": Spec(LLAMA2, with_inv_freq(llama_shapes), vocabularies.llama, "llama2_7b_chat"),
    "llama2_gqa": Spec(
        LLAMA2 | {"num_key_value_heads": 2}, llama_shapes, vocabularies.llama, "llama2_70b"
    ),
    "mistral": Spec(MISTRAL, llama_shapes, vocabularies.llama, "mistral_7b"),
    "zephyr": Spec(
        MISTRAL | {"pad_token_id": 2}, llama_shapes, vocabularies.zephyr, "zephyr_7b_beta"
    ),
    "chatglm2": Spec(
        CHATGLM | {"seq_length": 32768}, chatglm_shapes, vocabularies.chatglm2, "chatglm2_6b"
    ),
    "chatglm3": Spec(CHATGLM, chatglm_shapes, vocabularies.chatglm3, "chatglm3_6b"),
    "qwen": Spec(QWEN, qwen_shapes, vocabularies.qwen, "qwen_7b_chat"),
    "qwen_aug": Spec(QWEN_AUG, qwen_shapes, vocabularies.qwen, "qwen_7b"),
    "baichuan_7b": Spec(
        BAICHUAN_7B, with_inv_freq(baichuan_shapes), vocabularies.baichuan, "baichuan_7b"
    ),
    "baichuan2_7b": Spec(
        BAICHUAN2_7B, baichuan_shapes, vocabularies.baichuan2, "baichuan2_7b_chat"
    ),
    "baichuan_13b": Spec(BAICHUAN_13B, baichuan_shapes, vocabularies.baichuan, "baichuan_13b_chat"),
    "baichuan2_13b": Spec(
        BAICHUAN2_13B, baichuan_shapes, vocabularies.baichuan2, "baichuan2_13b_chat"
    ),
    "yi_first": Spec(
        YI | code("yi", "YiForCausalLM", "YiConfig") | {"model_type": "Yi"},
        yi_first_shapes, vocabularies.yi_first, "yi_6b",
    ),
    "yi_later": Spec(
        YI | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        llama_shapes, vocabularies.yi_later, "yi_34b",
    ),
    "starcoder": Spec(STARCODER, starcoder_shapes, vocabularies.starcoder, "starcoder"),
}  # fmt: skip
