"""Merged weights against formulas of their own, element by element, in float64.

The oracle takes a live PEFT model apart and knows nothing of the code under test. Sixteen shapes of
adapters and bases; every element may be off by the last bit of its type, and none by more.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.adapter import load_adapter, save_adapter
from raytune_ft.model.loading import load_model
from raytune_ft.model.merge import merge_to
from raytune_ft.model.nf4 import through_nf4
from raytune_ft.model.original import Original
from tests.conftest import make_tiny_model
from tests.model.families import make
from tests.model.test_adapter import logits

CPU = torch.device("cpu")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "tied, embedding adapted": (
        {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "tied, head adapted": (
        {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]},
    ),
    "biases in the base": ({"attention_bias": True}, {}),
    "biases trained": ({"attention_bias": True}, {"bias": "all"}),
    "biases of the adapter": (
        {"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True},
    ),
    "rslora": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "dora and embedding": ({}, {"use_dora": True, "target_modules": ["v_proj", "embed_tokens"]}),
    "tables trained": ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding trained, tied": (
        {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]},
    ),
    "rows of tokens": ({}, {"trainable_token_indices": {"embed_tokens": [3, 8], "lm_head": [8]}}),
    "rows of tokens, tied": (
        {"tie_word_embeddings": True}, {"trainable_token_indices": {"embed_tokens": [3, 8]}},
    ),
    "ranks and scales by layer": (
        {}, {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
             "alpha_pattern": {"v_proj": 3, "model.layers.0.mlp.up_proj": 50}},
    ),
    "odd widths": ({"hidden_size": 40, "intermediate_size": 50}, {}),
}  # fmt: skip


def live_model(folder: Path, changes: dict[str, Any], adapter: dict[str, Any]) -> Any:
    """A plain PEFT model on a base whose biases are not 0, all trained weights random."""
    folder.mkdir()
    make_tiny_model(folder, **changes)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    base.save_pretrained(folder)
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **adapter}
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def oracle(model: Any, config: LoraConfig) -> dict[str, torch.Tensor]:
    """Return W + (alpha/r) B A and its relatives in float64, by the base's names of tensors."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.base_model.model.named_modules():
        kind = type(module).__name__
        inside = any(part in path for part in ("base_layer", "modules_to_save", "original_module"))
        if inside or "lora_" in path or "token_adapter" in path:
            continue
        if hasattr(module, "lora_A") and module.scaling:
            scale = module.scaling["default"]
            weight = module.base_layer.weight.double()
            if kind == "Embedding":
                a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
                delta, along = (b.double() @ a.double()).T, 0
            else:
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                delta, along = b.double() @ a.double(), 1
            merged = weight + scale * delta
            if module.lora_magnitude_vector and "default" in module.lora_magnitude_vector:
                lengths = module.lora_magnitude_vector["default"].weight.double().flatten()
                factor = lengths / merged.norm(dim=along)
                merged = merged * (factor[:, None] if along == 1 else factor)
            found[f"{path}.weight"] = merged
            bias = getattr(module.base_layer, "bias", None)
            if bias is not None:
                found[f"{path}.bias"] = bias.double()
                if config.lora_bias:
                    found[f"{path}.bias"] += scale * module.lora_B["default"].bias.double()
        elif kind == "ModulesToSaveWrapper":
            found[f"{path}.weight"] = module.modules_to_save["default"].weight.double()
        elif kind == "TrainableTokensWrapper":
            adapter = module.token_adapter
            table = module.original_module.weight.double().clone()
            table[adapter.token_indices["default"]] = adapter.trainable_tokens_delta[
                "default"
            ].double()
            found[f"{path}.weight"] = table
        else:
            for name, parameter in module.named_parameters(recurse=False):
                found[f"{path}.{name}"] = parameter.double()
    return found


def ulps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return how many units in the last place of its type each element is off."""
    nearest = expected.to(found.dtype)
    away = torch.nextafter(nearest.abs(), torch.full_like(nearest, math.inf)) - nearest.abs()
    return (found.double() - expected).abs() / away.double()


@pytest.mark.parametrize("name", SHAPES)
def test_every_element_is_that_of_the_formula(tmp_path: Path, name: str) -> None:
    changes, adapter = SHAPES[name]
    model = live_model(tmp_path / "base", changes, adapter)
    save_adapter(model, tmp_path / "adapter", "base")
    expected, seen = oracle(model, model.peft_config["default"]), logits(model)
    report = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not report.in_memory
    merged = load_file(tmp_path / "out/model.safetensors")
    before = load_file(tmp_path / "base/model.safetensors")
    untied = "lm_head.weight" in merged
    assert merged.keys() - {"lm_head.weight"} == before.keys() - {"lm_head.weight"}
    for key, tensor in merged.items():
        assert ulps(tensor, expected[key].detach()).max() <= 1, key
    adapted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(adapted, seen, rtol=1e-5, atol=1e-5)
    tied = bool(changes.get("tie_word_embeddings"))
    apart = tied and name not in ("tied", "rows of tokens, tied")
    assert untied is (apart or not tied)
    assert any(not torch.equal(merged[key], before[key]) for key in before)
    for key, tensor in before.items():
        if "norm" in key:
            assert torch.equal(merged[key], tensor)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """Through float32, one in thousands of bfloat16 elements would be a unit off."""
    model = live_model(tmp_path / "base", {}, {})
    save_adapter(model, tmp_path / "adapter", "base")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" not in name:
                parameter.copy_(parameter.bfloat16())
    expected = oracle(model, model.peft_config["default"])
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for key, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[key].detach().to(torch.bfloat16)), key


@pytest.mark.parametrize("name", ["chatglm", "qwen", "baichuan-7b"])
def test_fused_layers_are_those_of_the_formula(tmp_path: Path, name: str) -> None:
    base = make(name, tmp_path / "base")
    plain: Any = load_model(base, ModelSection(path=str(base)), CPU)
    leaves = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model: Any = get_peft_model(plain, LoraConfig(r=2, lora_alpha=5, target_modules=leaves))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", "base")
    expected = oracle(model, model.peft_config["default"])
    merge_to(base, tmp_path / "adapter", tmp_path / "out")
    original, checked = Original.of(base), 0
    for key, tensor in load_file(tmp_path / "out/model.safetensors").items():
        for piece in original.family.layout.pieces(key, original.widths):
            if piece.name.rpartition(".")[0].endswith(tuple(leaves)) and piece.name in expected:
                assert ulps(tensor[piece.rows], expected[piece.name].detach()).max() <= 1, piece
                checked += 1
    assert checked >= 2 * len(leaves)


def test_an_int8_base_as_training_saw_it(tmp_path: Path) -> None:
    """Rows are scaled one by one, as the loaded layers are."""
    model = live_model(tmp_path / "base", {}, {"target_modules": ["q_proj"]})
    save_adapter(model, tmp_path / "adapter", "base")
    section = ModelSection(path="x", quantization="int8")
    report = merge_to(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out",
        base="dequantized", section=section,
    )  # fmt: skip
    merged = load_file(tmp_path / "out/model.safetensors")
    loaded: Any = load_model(tmp_path / "base", section, CPU)
    layer = loaded.model.layers[0].mlp.up_proj
    seen = layer.weight.CB.float() * (layer.weight.SCB.float() / 127.0)[:, None]
    torch.testing.assert_close(
        merged["model.layers.0.mlp.up_proj.weight"], seen, rtol=1e-6, atol=1e-7
    )
    lost = {layer.name: layer.lost for layer in report.drift.layers}
    assert 0 < lost["model.layers.0.mlp.up_proj.weight"] < 0.2


def test_what_no_formula_knows_is_merged_by_peft(tmp_path: Path) -> None:
    """GPT-2 has its linear layers transposed."""
    (tmp_path / "base").mkdir()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base: Any = load_model(tmp_path / "base", ModelSection(path="x"), CPU)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )  # fmt: skip
    model: Any = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", "base")
    report = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.in_memory
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    again = load_adapter(
        load_model(tmp_path / "base", ModelSection(path="x"), CPU), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again), logits(model))


def test_the_report_has_the_lengths_of_both_differences(tmp_path: Path) -> None:
    model = live_model(tmp_path / "base", {}, {"target_modules": ["up_proj"]})
    save_adapter(model, tmp_path / "adapter", "base")
    before = load_file(tmp_path / "base/model.safetensors")
    for base in ("original", "dequantized"):
        report = merge_to(
            tmp_path / "base", tmp_path / "adapter", tmp_path / base, base=base,
            section=ModelSection(path="x", quantization="nf4"),
        )  # fmt: skip
        merged = load_file(tmp_path / base / "model.safetensors")
        layers = {layer.name: layer for layer in report.drift.layers}
        name = "model.layers.1.mlp.up_proj.weight"
        seen = through_nf4(before[name], double_quant=True)
        started = before[name] if base == "original" else seen
        layer = layers[name]
        assert layer.lost == pytest.approx(float((before[name] - seen).norm()), rel=1e-5)
        assert layer.moved == pytest.approx(float((merged[name] - started).norm()), rel=1e-4)
        assert layer.weight == pytest.approx(float(before[name].norm()), rel=1e-5)
        assert layer.ratio == pytest.approx(layer.lost / layer.moved)
        assert json.loads(json.dumps(layer.as_json()))["lost_over_moved"] == layer.ratio
        kinds = [kind for kind, _ in report.drift.kinds()]
        assert kinds == ["up_proj"]
        assert report.drift.table()[2].startswith("up_proj")
