"""Footprint: the shape of a model in, numbers of its parameters and the widths of its layers out.

Two callers count: `model.memory` on the network itself, and `count` here from the shape on a model
card, so that `raytune-ft list` can name a figure at once. tests/config/test_footprint.py holds the
two against each other for every card. `peak` turns the numbers into bytes, `pace` into seconds.
No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.schema import Recipe

LOGIT_ROWS = 512
"""Tokens whose logits exist at once: the loss goes through the head in chunks of so many. On an
H200, twice as many save 0.3 of 7.5 ms at 103,168 words and take 0.6 GiB more; half as many take 1.6
times as long at 32,000 words."""
BUCKETS = 8
"""Stretches in which ZeRO exchanges gradients, so that one travels while the next is made."""
SMALLEST_BUCKET, LARGEST_BUCKET = 2**20, 500_000_000
"""Elements; the largest is DeepSpeed's own."""

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that some networks hold as one: the part's name -> the whole's."""

_READS = {
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "qkv_proj": "attention",
    "c_attn": "attention", "gate_proj": "mlp", "up_proj": "mlp", "gate_up_proj": "mlp",
    "c_fc": "mlp",
}  # fmt: skip
"""Layers that read one tensor with others."""
FOUR_NORMS = frozenset({"gemma2", "gemma3_text", "glm4"})
NORMED_HEADS = frozenset({"qwen3", "gemma3_text"})
NOT_FAST = frozenset({"mixtral"})
"""Types whose attention or MLP keeps its own way under `model.fast_path`."""


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
    adapted: int
    """Adapted layers of one decoder layer; as the next two."""
    adapter_inputs: int
    """Sum of their input widths."""
    own_inputs: int
    """The same, but layers that read one tensor counted once, and what attention keeps anyway not
    at all; for full training of all layers."""
    layers: int
    hidden: int
    mlp: int
    attention: int
    """Width of queries plus that of keys and values."""
    queries: int
    norms: int
    """Sum of the widths that the norms of one decoder layer read."""
    vocabulary: int
    mask_heads: int = 0
    """Heads with an attention mask of their own (ALiBi); 0: one mask of booleans for all."""
    has_fast_form: bool = True
    """Whether its decoder layers compute by the fast path's kernels."""

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


def bucket_elements(trained: int) -> int:
    """Return how many gradients ZeRO exchanges at once; DeepSpeed's own buffers suit full training.

    For an adapter they would be several times its gradients: 1.9 GiB beside 0.3 GiB at 7B.
    """
    return min(LARGEST_BUCKET, max(SMALLEST_BUCKET, -(-trained // BUCKETS)))


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
    full = recipe.model.method == "full"
    adapted = [layer for layer in linears if _is_target(layer.name, recipe)]
    heads, kv_heads, head_dim = _heads(shape)
    return Counts(
        linear=linear,
        largest_linear=max(layer.inputs * layer.outputs for layer in linears),
        embedding=embedding,
        head=0 if tied else embedding,
        other=other,
        trained=total if full else layers * _lora(recipe, adapted),
        adapted=len(adapted),
        adapter_inputs=sum(layer.inputs for layer in adapted),
        own_inputs=own_inputs(
            ((one.name, one.inputs) for one in (linears if full else adapted)),
            int(shape["intermediate_size"]),
        ),
        layers=layers,
        hidden=hidden,
        mlp=int(shape["intermediate_size"]),
        attention=(heads + 2 * kv_heads) * head_dim,
        queries=heads * head_dim,
        norms=norm_widths(str(shape["model_type"]), hidden, heads * head_dim, kv_heads * head_dim),
        vocabulary=int(shape["vocab_size"]),
        mask_heads=heads if shape.get("alibi") else 0,
        has_fast_form=str(shape["model_type"]) not in NOT_FAST,
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


def own_inputs(layers: Iterable[tuple[str, int]], mlp: int) -> int:
    """Return the widths of distinct inputs of layers, (leaf name, input width) each."""
    distinct = {_READS.get(name, name): width for name, width in layers}
    # what follows attention reads the very tensor that attention keeps
    return sum(w for name, w in distinct.items() if name in _READS.values() or w == mlp)


def norm_widths(kind: str, hidden: int, queries: int, keys: int) -> int:
    """Return the widths that the norms of one decoder layer read, summed up."""
    norms = 4 if kind in FOUR_NORMS else 2
    return norms * hidden + (queries + keys if kind in NORMED_HEADS else 0)


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
