"""Merging and adapters across layouts: fused tensors in the files, single layers in the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.model.adapter import attach, has_head, load_adapter, merge_to, save_adapter
from raytune_ft.model.families import detect
from tests.model.families import CONFIGS, CONVERTED, HIDDEN, LAYERS, layer, make, tensors
from tests.model.test_families_files import load, logits

HEADS = ("lm_head.weight", "transformer.output_layer.weight")
NORMED = ("baichuan2-7b", "baichuan2-13b")


def trained(folder: Path, lora: LoraSection, *, head_trained: bool = False, **section: Any) -> Any:
    """An adapter whose matrices are all random."""
    model = attach(load(folder, head_trained=head_trained, **section), lora, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def merged(tmp_path: Path, model: Any, name: str = "out", **options: Any) -> Path:
    save_adapter(model, tmp_path / "adapter", "base")
    merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_layout_answers_as_base_plus_adapter(name: str, tmp_path: Path) -> None:
    """float32: only the order of additions differs. Untouched tensors keep their bytes."""
    base = make(name, tmp_path / "base", shards=2)
    (base / "modeling_it.py").write_text("raise SystemExit('never run')\n")
    model = trained(base, LoraSection(r=2, dropout=0.0))
    expected = logits(model)
    out = merged(tmp_path, model, max_shard_size="1GB")
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(load(base)), atol=1e-3)
    written, before = load_file(out / "model.safetensors"), tensors(name)
    assert list(written) == sorted(before)
    changed = {key for key in before if not torch.equal(written[key], before[key])}
    assert not any("norm" in key or "inv_freq" in key or key in HEADS for key in changed)
    for file in ("config.json", "modeling_it.py"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


@pytest.mark.parametrize("name", [n for n in CONFIGS if "13b" not in n])
def test_the_native_layout_loads_without_the_family(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path / "base")
    (base / "modeling_it.py").touch()
    model = trained(base, LoraSection(r=2, dropout=0.0))
    out = merged(tmp_path, model, layout="native")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(plain).__module__.startswith("transformers.models.")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=2e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] in {"llama", "glm", "qwen2", "gpt_bigcode"}
    assert "auto_map" not in config
    assert (out / "modeling_it.py").exists() is (name == "starcoder")


@pytest.mark.parametrize("name", ["baichuan-13b", "baichuan2-13b"])
def test_alibi_has_no_native_layout(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path / "base")
    with pytest.raises(RecipeError, match=r"no native layout \(.*ALiBi.*\); merge with layout ori"):
        merge_to(base, tmp_path, tmp_path / "out", layout="native")


@pytest.mark.parametrize("name", ["chatglm", "qwen", "baichuan-7b"])
def test_what_training_saw_in_nf4_is_merged_part_by_part(name: str, tmp_path: Path) -> None:
    """Parts of a fused tensor are quantised one by one, as loading does."""
    base = make(name, tmp_path / "base")
    model = trained(base, LoraSection(r=2, dropout=0.0), quantization="nf4")
    out = merged(tmp_path, model, base="dequantized")
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize("change", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_merged_in_memory_both_layouts_answer_alike(
    tmp_path: Path, change: dict[str, Any], layout: Any
) -> None:
    base = make("baichuan2-7b", tmp_path / "base")
    lora = LoraSection.model_validate({"r": 2, "dropout": 0.0, **change})
    model = trained(base, lora, head_trained="modules_to_save" in change)
    out = merged(tmp_path, model, layout=layout)
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-5, atol=2e-5)
    assert load_file(out / "model.safetensors")["lm_head.weight"].shape == (125696, HIDDEN)


@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize("name", ["baichuan2-7b", "chatglm"])
def test_an_adapter_of_the_head_merges_inside_its_rows_lengths(
    name: str, layout: Any, tmp_path: Path
) -> None:
    base = make(name, tmp_path / "base")
    lora = LoraSection(r=2, dropout=0.0, targets=["lm_head", "o_proj"])
    model = trained(base, lora, head_trained=True)
    out = merged(tmp_path, model, layout=layout)
    assert has_head(tmp_path / "adapter")
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-5, atol=2e-5)
    again = load_adapter(load(base, head_trained=True), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


FUSED: dict[str, list[str]] = {
    "chatglm": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "qwen": ["c_attn", "c_proj", "w1", "w2"],
    "baichuan-13b": ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def original_adapter(name: str, folder: Path, *, pickled: bool = False) -> dict[str, torch.Tensor]:
    """Write an adapter as the original network's tool does; return the deltas by tensor."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    weights, deltas = {}, {}
    for key, tensor in tensors(name).items():
        module = key.removesuffix(".weight")
        if tensor.dim() == 2 and module.rpartition(".")[2] in FUSED[name]:
            a = torch.randn(3, tensor.shape[1], generator=generator) * 0.1
            b = torch.randn(tensor.shape[0], 3, generator=generator) * 0.1
            weights[f"base_model.model.{module}.lora_A.weight"] = a
            weights[f"base_model.model.{module}.lora_B.weight"] = b
            deltas[key] = 2.0 * b @ a
    LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=FUSED[name]
    ).save_pretrained(folder)
    if pickled:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("pickled", [False, True])
def test_adapters_under_original_names_are_exact(name: str, pickled: bool, tmp_path: Path) -> None:
    """The oracle adds scale * B A to the fused tensors of the files themselves."""
    base = make(name, tmp_path / "base")
    deltas = original_adapter(name, tmp_path / "adapter", pickled=pickled)
    assert len(deltas) == LAYERS * len(set(layer_tensors(name)))
    summed = {key: t + deltas.get(key, 0.0) for key, t in tensors(name).items()}
    oracle = make(name, tmp_path / "oracle")
    save_file(summed, oracle / "model.safetensors", metadata={"format": "pt"})
    expected = logits(load(oracle))
    adapted = load_adapter(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=2e-5)
    merge_to(base, tmp_path / "adapter", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(summed)
    for key, tensor in summed.items():
        torch.testing.assert_close(written[key], tensor, rtol=1e-6, atol=1e-6)


def layer_tensors(name: str) -> list[str]:
    return [
        key
        for key, shape in layer(name).items()
        if len(shape) == 2 and key.removesuffix(".weight").rpartition(".")[2] in FUSED[name]
    ]


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    base = make("chatglm", tmp_path / "base")
    original_adapter("chatglm", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if "query_key_value.lora_B" in k)
    save_file(weights | {key: weights[key][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=r"'transformer.*query_key_value' has 63 rows") as got:
        load_adapter(load(base), tmp_path / "adapter")
    assert "\n" not in str(got.value)


def test_a_rank_per_layer_under_original_names_is_refused(tmp_path: Path) -> None:
    base = make("qwen", tmp_path / "base")
    original_adapter("qwen", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"rank_pattern": {"c_attn": 3}}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="rank_pattern or alpha_pattern"):
        load_adapter(load(base), tmp_path / "adapter")


def test_converted_families_are_those_with_a_layout() -> None:
    assert [n for n in CONFIGS if detect(CONFIGS[n]).layout.rules] == CONVERTED
    assert [n for n in CONFIGS if detect(CONFIGS[n]).normalised_head] == list(NORMED)


def test_whole_modules_under_original_names_are_found(tmp_path: Path) -> None:
    """An embedding trained beside the adapter: `word_embeddings` is `embed_tokens` here."""
    base = make("chatglm", tmp_path / "base")
    original_adapter("chatglm", tmp_path / "adapter")
    file, config = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter"
    words = torch.randn(96, HIDDEN, generator=torch.Generator().manual_seed(8))
    name = "transformer.embedding.word_embeddings.weight"
    save_file(load_file(file) | {f"base_model.model.{name}": words}, file)
    content = json.loads((config / "adapter_config.json").read_text())
    (config / "adapter_config.json").write_text(
        json.dumps(content | {"modules_to_save": ["word_embeddings"]})
    )
    adapted = load_adapter(load(base), config)
    assert torch.equal(adapted.get_base_model().get_input_embeddings()(torch.arange(96)), words)
    merge_to(base, config, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], words)


def test_a_target_of_the_files_is_explained(tmp_path: Path) -> None:
    base = make("baichuan-7b", tmp_path)
    with pytest.raises(RecipeError, match=r"'W_pack' of its files is q_proj, k_proj, v_proj here"):
        attach(load(base), LoraSection(targets=["W_pack"]), seed=0)


def test_a_stored_copy_of_a_tied_head_stays(tmp_path: Path) -> None:
    base = make("starcoder", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    copy = {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    save_file(weights | copy, base / "model.safetensors", metadata={"format": "pt"})
    out = merged(tmp_path, trained(base, LoraSection(r=2, dropout=0.0)))
    assert set(load_file(out / "model.safetensors")) == set(weights | copy)
