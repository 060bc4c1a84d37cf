"""InternLM, first generation: against a forward pass written from its description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.families import detect
from raytune_ft.model.loading import load_model

HIDDEN, HEADS, LAYERS, MLP, VOCAB = 32, 4, 3, 48, 61
Weights = dict[str, torch.Tensor]


def random_weights(*, bias: bool) -> Weights:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    weights = {
        "model.embed_tokens.weight": draw(VOCAB, HIDDEN),
        "lm_head.weight": draw(VOCAB, HIDDEN),
    }
    weights["model.norm.weight"] = 1 + draw(HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for part in "qkvo":
            weights[f"{layer}self_attn.{part}_proj.weight"] = draw(HIDDEN, HIDDEN)
            if bias:
                weights[f"{layer}self_attn.{part}_proj.bias"] = draw(HIDDEN)
        weights[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.zeros(HIDDEN // HEADS // 2)
        weights[f"{layer}mlp.gate_proj.weight"] = draw(MLP, HIDDEN)
        weights[f"{layer}mlp.up_proj.weight"] = draw(MLP, HIDDEN)
        weights[f"{layer}mlp.down_proj.weight"] = draw(HIDDEN, MLP)
        weights[f"{layer}input_layernorm.weight"] = 1 + draw(HIDDEN)
        weights[f"{layer}post_attention_layernorm.weight"] = 1 + draw(HIDDEN)
    return weights


def write(folder: Path, weights: Weights, *, bias: bool) -> Path:
    config = {
        "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": bias,
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "vocab_size": VOCAB, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by complex numbers, dimension i paired with i + d/2; x is (h, n, d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], -1)


def reference_logits(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of ids (n,)."""
    n, d = len(ids), HIDDEN // HEADS
    x = weights["model.embed_tokens.weight"][ids]
    future = torch.ones(n, n).triu(1).bool()

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        h = rms(x, weights[f"{layer}input_layernorm.weight"])
        q, k, v = (
            linear(f"{layer}self_attn.{p}_proj", h).view(n, HEADS, d).transpose(0, 1) for p in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / d**0.5
        seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(f"{layer}self_attn.o_proj", seen.transpose(0, 1).reshape(n, HIDDEN))
        h = rms(x, weights[f"{layer}post_attention_layernorm.weight"])
        gate = nn.functional.silu(linear(f"{layer}mlp.gate_proj", h))
        x = x + linear(f"{layer}mlp.down_proj", gate * linear(f"{layer}mlp.up_proj", h))
    return rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_the_reference(tmp_path: Path, bias: bool) -> None:
    """float32: 1e-5 of logits of a few units."""
    weights = random_weights(bias=bias)
    folder = write(tmp_path, weights, bias=bias)
    model = load_model(folder, ModelSection(path=str(folder)), torch.device("cpu"))
    ids = torch.randint(1, VOCAB, (19,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours = model(input_ids=ids.unsqueeze(0)).logits[0]
    expected = reference_logits(weights, ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_defaults_are_those_of_the_7b() -> None:
    config = detect({"model_type": "internlm"}).translate({"model_type": "internlm"})
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (103168, 4096, 32)
    assert config.attention_bias is True
    assert config.mlp_bias is False
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_a_longer_rotary_base_is_read() -> None:
    values = {"model_type": "internlm", "rotary": {"base": 50000, "type": "dynamic"}}
    assert detect(values).translate(values).rope_parameters["rope_theta"] == 50000.0
