"""Memory of a recipe by arithmetic: numbers of parameters in, bytes per worker out. No torch.

Two callers count parameters: `model.memory` on the network itself, and `count` here from the shape
on a model card, so that `raytune-ft list` can name a figure at once. tests/config/test_footprint.py
holds the two against each other for every card. What activations take is a formula, checked
against measured runs (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.schema import Recipe

# Bytes per weight with their scales: one scale per 64 weights, a second level per 256 scales.
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
NF4_SINGLE = 0.5 + 4 / 64
INT8 = 1.0

LOGIT_BYTES = 12
"""Per logit of a chunk: log-softmax, its gradient and the one before it, in float32."""
LOGIT_ROWS = 1024
"""Tokens whose logits exist at once: the loss goes through the head in chunks of so many."""
GPU_CONTEXT = 600 * 2**20
"""What a CUDA process holds outside torch's allocator."""
RECOMPUTE_FROM_TOKENS = 512
"""`gradient_checkpointing: auto` recomputes above this many tokens per micro-batch."""

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that some networks hold as one: the part's name -> the whole's."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and the widths that activations depend on."""

    linear: int
    largest_linear: int
    embedding: int
    head: int
    """0 where the head is tied to the embedding."""
    other: int
    """Norms and biases."""
    trained: int
    adapter_inputs: int
    """Sum of the input widths of adapted layers, one decoder layer."""
    layers: int
    hidden: int
    mlp: int
    attention: int
    """Width of queries plus that of keys and values."""
    vocabulary: int
    mask_heads: int = 0
    """Heads with an attention mask of their own (ALiBi); 0: one mask of booleans for all."""

    @property
    def total(self) -> int:
        """All parameters of the base model."""
        return self.linear + self.embedding + self.head + self.other


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False


def memory_bytes(recipe: Recipe, counts: Counts, *, on_gpu: bool) -> dict[str, int]:
    """Return the peak memory of one worker by part, in bytes; parts of 0 are left out."""
    model = recipe.model
    width = _compute_bytes(recipe, on_gpu=on_gpu)
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    layer = _layer_bytes(recipe, counts, width)
    if _recompute(recipe, tokens, on_gpu=on_gpu):
        activations = tokens * (counts.layers * counts.hidden * width + layer)
    else:
        activations = tokens * counts.layers * layer
    shards = recipe.run.workers if recipe.train.deepspeed.startswith("zero3") else 1
    # quantised weights are unpacked one layer at a time, forward and backward
    unpacked = 0 if model.quantization == "none" else 2 * counts.largest_linear * width
    parts = {
        "base weights": (counts.linear * _stored(recipe, width) + counts.other * width) / shards,
        "embedding and head": (counts.embedding + counts.head) * width / shards,
        **_training_state(recipe, counts, width, on_gpu=on_gpu),
        "activations": activations,
        "logits": min(tokens, LOGIT_ROWS) * counts.vocabulary * LOGIT_BYTES,
        "workspace": unpacked + tokens * recipe.data.max_length * (counts.mask_heads * width or 1),
        "GPU context": GPU_CONTEXT if on_gpu else 0,
    }
    return {name: int(size) for name, size in parts.items() if size}


def count(shape: Mapping[str, Any], recipe: Recipe) -> Counts:
    """Count the parameters of a model card's shape.

    Args:
        shape: `config` of the card, in the words of the model type's config.json.
        recipe: says which layers are adapted; `lora.bias` and `lora.modules_to_save` are not
            looked at, because no shipped recipe sets them.
    """
    layers, hidden = int(shape["num_hidden_layers"]), int(shape["hidden_size"])
    linears = linear_layers(shape)
    embedding = int(shape["vocab_size"]) * hidden
    linear = layers * sum(layer.inputs * layer.outputs for layer in linears)
    tied = bool(shape["tie_word_embeddings"])
    other = layers * _small(shape, linears) + _outside(shape)
    total = linear + other + embedding * (1 if tied else 2)
    adapted = [layer for layer in linears if _is_target(layer.name, recipe)]
    heads, kv_heads, head_dim = _heads(shape)
    return Counts(
        linear=linear,
        largest_linear=max(layer.inputs * layer.outputs for layer in linears),
        embedding=embedding,
        head=0 if tied else embedding,
        other=other,
        trained=total if recipe.model.method == "full" else layers * _lora(recipe, adapted),
        adapter_inputs=sum(layer.inputs for layer in adapted),
        layers=layers,
        hidden=hidden,
        mlp=int(shape["intermediate_size"]),
        attention=(heads + 2 * kv_heads) * head_dim,
        vocabulary=int(shape["vocab_size"]),
        mask_heads=heads if shape.get("alibi") else 0,
    )


def linear_layers(shape: Mapping[str, Any]) -> list[Linear]:
    """Return the linear layers of one decoder layer; the output head is none of them."""
    kind, hidden, mlp = shape["model_type"], shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads, head_dim = _heads(shape)
    q, kv = heads * head_dim, kv_heads * head_dim
    if kind == "gpt_bigcode":
        return [
            Linear("c_attn", hidden, q + 2 * kv, has_bias=True),
            Linear("c_proj", q, hidden, has_bias=True),
            Linear("c_fc", hidden, mlp, has_bias=True),
            Linear("c_proj", mlp, hidden, has_bias=True),
        ]
    biased = kind == "qwen2" or bool(shape.get("attention_bias"))
    if kind == "phi3":
        attention = [Linear("qkv_proj", hidden, q + 2 * kv)]
    else:
        widths = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        attention = [Linear(name, hidden, width, biased) for name, width in widths.items()]
    attention.append(Linear("o_proj", q, hidden, biased and kind == "llama"))
    if kind in {"phi3", "glm", "glm4"}:
        into = [Linear("gate_up_proj", hidden, 2 * mlp)]
    else:
        into = [Linear("gate_proj", hidden, mlp), Linear("up_proj", hidden, mlp)]
    return [*attention, *into, Linear("down_proj", mlp, hidden)]


def fitting_targets(targets: Sequence[str], shape: Mapping[str, Any]) -> list[str]:
    """Return LoRA targets as a network names them; empty if it has none of these layers."""
    known = {layer.name for layer in linear_layers(shape)}
    if all(target not in known and FUSED.get(target) not in known for target in targets):
        return []
    # a name that the network lacks stays where others fit: XTuner's own lists have such names
    named = (FUSED[t] if t not in known and FUSED.get(t) in known else t for t in targets)
    return list(dict.fromkeys(named))


def _heads(shape: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of query heads and key heads, and the width of one."""
    heads = int(shape["num_attention_heads"])
    head_dim = int(shape.get("head_dim") or shape["hidden_size"] // heads)
    return heads, int(shape.get("num_key_value_heads") or heads), head_dim


def _small(shape: Mapping[str, Any], linears: Sequence[Linear]) -> int:
    """Count the norms and biases of one decoder layer."""
    kind, hidden = shape["model_type"], int(shape["hidden_size"])
    norms = 4 if kind in {"gemma2", "gemma3_text", "glm4", "gpt_bigcode"} else 2
    of_heads = 2 * _heads(shape)[2] if kind in {"qwen3", "gemma3_text"} else 0
    return norms * hidden + of_heads + sum(one.outputs for one in linears if one.has_bias)


def _outside(shape: Mapping[str, Any]) -> int:
    """Count what stands outside the decoder layers, beside embedding and head."""
    hidden = int(shape["hidden_size"])
    if shape["model_type"] == "gpt_bigcode":
        return 2 * hidden + int(shape["max_position_embeddings"]) * hidden
    return hidden


def _is_target(name: str, recipe: Recipe) -> bool:
    return recipe.lora.targets == "all-linear" or name in recipe.lora.targets


def _lora(recipe: Recipe, adapted: Sequence[Linear]) -> int:
    """Count the adapter's parameters in one decoder layer."""
    scales = sum(layer.outputs for layer in adapted) if recipe.lora.use_dora else 0
    return scales + recipe.lora.r * sum(layer.inputs + layer.outputs for layer in adapted)


def _stored(recipe: Recipe, width: int) -> float:
    """Return the bytes that a weight of a linear layer takes."""
    if recipe.model.quantization == "none":
        return width
    if recipe.model.quantization == "int8":
        return INT8
    return NF4_DOUBLE if recipe.model.double_quant else NF4_SINGLE


def _training_state(
    recipe: Recipe, counts: Counts, width: int, *, on_gpu: bool
) -> dict[str, float]:
    """Adapters, gradients and optimizer; DeepSpeed keeps a float32 copy beside 16-bit weights."""
    zero, n = recipe.train.deepspeed, counts.trained
    sharded = recipe.run.workers if zero != "none" else 1
    on_host = on_gpu and (zero.endswith("_offload") or recipe.train.optimizer.startswith("paged"))
    lora = recipe.model.method == "lora"
    if zero != "none" and width == 2:
        trained, master = 2, 4
    else:
        trained, master = (4 if lora else width), 0
    moments = 2 * 1.02 if recipe.train.optimizer.endswith("8bit") else 2 * max(trained, master)
    shards = sharded if zero.startswith("zero3") else 1
    return {
        "adapters": n * trained / shards if lora else 0,
        "gradients": n * trained / (sharded if zero[:5] in {"zero2", "zero3"} else 1),
        "optimizer": (0 if on_host else n * moments / sharded)
        + (0 if zero.endswith("_offload") and on_gpu else n * master / sharded),
    }


def _layer_bytes(recipe: Recipe, counts: Counts, width: int) -> int:
    """Bytes that one decoder layer keeps per token for its backward pass, plain torch kernels."""
    norms = 2 * 8 * counts.hidden  # each keeps a float32 copy of its input and result
    attention = width * (3 * counts.attention + counts.hidden)  # before, in and after rotation
    mlp = width * 4 * counts.mlp  # gate, its activation, up, and their product
    if recipe.model.method == "full":
        return norms + attention + mlp + width * 2 * counts.hidden
    # float32 adapters and dropout give every adapted layer an input copy of its own
    own_copy = width == 4 or recipe.train.deepspeed == "none" or recipe.lora.dropout > 0
    copied = counts.adapter_inputs if own_copy else counts.adapter_inputs // 2
    adapter_width = width if recipe.train.deepspeed != "none" else 4
    return norms + attention + mlp + copied * adapter_width


def _recompute(recipe: Recipe, tokens: int, *, on_gpu: bool) -> bool:
    choice = recipe.model.gradient_checkpointing
    return on_gpu and tokens > RECOMPUTE_FROM_TOKENS if choice == "auto" else choice


def _compute_bytes(recipe: Recipe, *, on_gpu: bool) -> int:
    if recipe.model.dtype == "auto":
        return 2 if on_gpu else 4
    return 4 if recipe.model.dtype == "float32" else 2
