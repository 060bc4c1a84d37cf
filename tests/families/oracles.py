"""Independent networks of the families: original tensors and ids in, logits out.

Written from the published architectures in plain torch, on the ORIGINAL tensor names, for one
sample without padding and without cache. Padding, packing and caches are checked by comparing
with the samples alone. float64, so that what is measured is the other side's rounding.

Shapes: n = tokens, V = words, h = width, H = query heads, G = key and value heads, d = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from tests.families.checkpoints import Config, Weights

Oracle = Callable[[Config, Weights, Tensor], Tensor]
"""(config.json, original weights, ids (n,)) -> logits (n, V)"""


def logits_of(family: str, config: Config, weights: Weights, ids: Sequence[int] | Tensor) -> Tensor:
    """Return the float64 logits (n, V) of one sample."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    return ORACLES[family](config, exact, torch.as_tensor(ids, dtype=torch.long))


def greedy(
    family: str, config: Config, weights: Weights, prompt: Sequence[int], count: int
) -> list[int]:
    """Continue a prompt by `count` likeliest tokens, each from a forward pass of its own."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(family, config, weights, ids)[-1].argmax()))
    return ids[len(prompt) :]


# Parts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def angles(n: int, pairs: int, base: float) -> Tensor:
    """Return complex rotations (n, pairs): position p turns pair j by p base^(-j/pairs)."""
    speed = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.polar(torch.ones(n, pairs, dtype=torch.float64), torch.arange(n)[:, None] * speed)


def rotate_halves(x: Tensor, base: float) -> Tensor:
    """Turn x (H, n, d): dimension j is paired with j + d/2, as in Llama."""
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * angles(x.shape[1], first.shape[-1], base)
    return torch.cat([turned.real, turned.imag], -1)


def rotate_neighbours(x: Tensor, base: float) -> Tensor:
    """Turn x (H, n, d): dimension 2j is paired with 2j + 1, as in GPT-J and GLM."""
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * angles(x.shape[1], pairs.shape[-2], base)
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)


def alibi_slopes(heads: int) -> list[float]:
    """Return one slope per head (Press et al. 2021, with their rule for odd head counts).

    For a power of two p: 2^(-8/p), 2^(-16/p), ..., 2^-8. Above it, every second slope of 2p.
    """
    p = 1 << (heads.bit_length() - 1)
    regular = [2.0 ** (-8.0 * i / p) for i in range(1, p + 1)]
    between = [2.0 ** (-8.0 * i / (2 * p)) for i in range(1, 2 * p + 1, 2)]
    return regular + between[: heads - p]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, slopes: list[float] | None = None
) -> Tensor:
    """Return (n, H * d) of causal attention; q (H, n, d), k and v (G, n, d).

    Args:
        q: queries; head i reads key head i // (H / G).
        k: keys.
        v: values.
        window: a query sees itself and this many keys less one before it.
        slopes: ALiBi, one per head; a key at distance t loses slope * t.
    """
    heads, n, d = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
    distance = torch.arange(n)[:, None] - torch.arange(n)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = q @ k.mT / d**0.5
    if slopes is not None:
        scores = scores - torch.tensor(slopes, dtype=q.dtype)[:, None, None] * distance
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def by_heads(x: Tensor, d: int) -> Tensor:
    """Turn (n, H * d) into (H, n, d)."""
    return x.unflatten(-1, (-1, d)).transpose(0, 1)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + bias


# Families


def llama(c: Config, w: Weights, ids: Tensor, *, norms: tuple[str, str] | None = None) -> Tensor:
    """Llama, InternLM (biases if the file has them), Mistral (window), Yi (`norms` renamed)."""
    before, after = norms or ("input_layernorm", "post_attention_layernorm")
    d, eps = c["hidden_size"] // c["num_attention_heads"], c["rms_norm_eps"]
    turn = partial(rotate_halves, base=c.get("rope_theta", 10000.0))
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        y = rms_norm(x, w[f"{at}{before}.weight"], eps)
        q, k, v = (by_heads(linear(w, f"{at}self_attn.{p}_proj", y), d) for p in "qkv")
        seen = attend(turn(q), turn(k), v, window=c.get("sliding_window"))
        x = x + linear(w, f"{at}self_attn.o_proj", seen)
        x = x + gated(w, f"{at}mlp.", rms_norm(x, w[f"{at}{after}.weight"], eps))
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def gated(w: Weights, at: str, y: Tensor) -> Tensor:
    gate = silu(linear(w, f"{at}gate_proj", y))
    return linear(w, f"{at}down_proj", gate * linear(w, f"{at}up_proj", y))


def baichuan(
    c: Config, w: Weights, ids: Tensor, *, alibi: bool = False, norm_head: bool = False
) -> Tensor:
    """Baichuan: W_pack holds q, k, v one below the other.

    13B has ALiBi instead of rotary positions; Baichuan2 divides each row of the head by its length.
    """
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    d = c["hidden_size"] // heads
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        packed = linear(
            w, f"{at}self_attn.W_pack", rms_norm(x, w[f"{at}input_layernorm.weight"], eps)
        )
        q, k, v = (by_heads(part, d) for part in packed.split(c["hidden_size"], -1))
        if alibi:
            seen = attend(q, k, v, slopes=alibi_slopes(heads))
        else:
            seen = attend(rotate_halves(q, 10000.0), rotate_halves(k, 10000.0), v)
        x = x + linear(w, f"{at}self_attn.o_proj", seen)
        y = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], eps)
        x = x + gated(w, f"{at}mlp.", y)
    head = w["lm_head.weight"]
    if norm_head:
        head = head / head.square().sum(-1, keepdim=True).sqrt()
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def chatglm(c: Config, w: Weights, ids: Tensor) -> Tensor:
    """ChatGLM2 and 3: the first half of each head turns, in neighbouring pairs; few key heads."""
    d, groups, eps = c["kv_channels"], c["multi_query_group_num"], c["layernorm_epsilon"]
    sizes = [c["hidden_size"], groups * d, groups * d]

    def turn(x: Tensor) -> Tensor:
        return torch.cat([rotate_neighbours(x[..., : d // 2], 10000.0), x[..., d // 2 :]], -1)

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        y = rms_norm(x, w[f"{at}input_layernorm.weight"], eps)
        fused = linear(w, f"{at}self_attention.query_key_value", y).split(sizes, -1)
        q, k, v = (by_heads(part, d) for part in fused)
        x = x + linear(w, f"{at}self_attention.dense", attend(turn(q), turn(k), v))
        y = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = linear(w, f"{at}mlp.dense_h_to_4h", y).chunk(2, -1)
        x = x + linear(w, f"{at}mlp.dense_4h_to_h", silu(gate) * up)
    x = rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].T


def qwen(c: Config, w: Weights, ids: Tensor) -> Tensor:
    """Qwen, first generation, within its training length: w2 is the gate, w1 is gated."""
    layers = c.get("num_hidden_layers", c.get("n_layer"))
    d, eps = c["kv_channels"], c["layer_norm_epsilon"]
    turn = partial(rotate_halves, base=float(c["rotary_emb_base"]))
    x = w["transformer.wte.weight"][ids]
    for i in range(layers):
        at = f"transformer.h.{i}."
        fused = linear(w, f"{at}attn.c_attn", rms_norm(x, w[f"{at}ln_1.weight"], eps))
        q, k, v = (by_heads(part, d) for part in fused.chunk(3, -1))
        x = x + linear(w, f"{at}attn.c_proj", attend(turn(q), turn(k), v))
        y = rms_norm(x, w[f"{at}ln_2.weight"], eps)
        gated_up = linear(w, f"{at}mlp.w1", y) * silu(linear(w, f"{at}mlp.w2", y))
        x = x + linear(w, f"{at}mlp.c_proj", gated_up)
    return rms_norm(x, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T


def starcoder(c: Config, w: Weights, ids: Tensor) -> Tensor:
    """GPT-2 with one key and value head (Shazeer 2019) and learned positions; tied head."""
    h, eps = c["n_embd"], c["layer_norm_epsilon"]
    d = h // c["n_head"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (h,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        fused = linear(w, f"{at}attn.c_attn", norm(x, f"{at}ln_1"))
        q, k, v = (by_heads(part, d) for part in fused.split([h, d, d], -1))
        x = x + linear(w, f"{at}attn.c_proj", attend(q, k, v))
        x = x + linear(w, f"{at}mlp.c_proj", gelu(linear(w, f"{at}mlp.c_fc", norm(x, f"{at}ln_2"))))
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


ORACLES: dict[str, Oracle] = {
    **dict.fromkeys(
        ("internlm_7b", "internlm_20b", "llama", "llama2", "llama2_gqa", "mistral", "zephyr"), llama
    ),
    "yi_first": partial(llama, norms=("ln1", "ln2")),
    "yi_later": llama,
    "chatglm2": chatglm,
    "chatglm3": chatglm,
    "qwen": qwen,
    "qwen_aug": qwen,
    "baichuan_7b": baichuan,
    "baichuan2_7b": partial(baichuan, norm_head=True),
    "baichuan_13b": partial(baichuan, alibi=True),
    "baichuan2_13b": partial(baichuan, alibi=True, norm_head=True),
    "starcoder": starcoder,
}
