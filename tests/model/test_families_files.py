"""Original checkpoints: read in every form, and written back as they were."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.model.adapter import attach, linear_names
from raytune_ft.model.families import detect, translate
from raytune_ft.model.families.layout import widths_of
from raytune_ft.model.loading import load_model
from raytune_ft.model.side_files import save_full
from tests.model.families import CONFIGS, CONVERTED, LAYERS, make, tensors

CPU = torch.device("cpu")
IDS = torch.arange(3, 20).unsqueeze(0)


def load(folder: Path, *, head_trained: bool = False, **section: Any) -> Any:
    values = ModelSection.model_validate({"path": str(folder), **section})
    return load_model(folder, values, CPU, head_trained=head_trained)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_each_original_tensor_lands_where_the_layout_says(name: str, tmp_path: Path) -> None:
    """The layout and what transformers loaded are two readings of one table: they must agree."""
    family, config = detect(CONFIGS[name]), translate(CONFIGS[name])
    model = load(make(name, tmp_path), head_trained=True)
    state = model.state_dict()
    seen = set()
    for original, tensor in tensors(name).items():
        if family.is_spare(original):
            continue
        for piece in family.layout.pieces(original, widths_of(config)):
            assert torch.equal(state[piece.name], tensor[piece.rows]), original
            assert family.layout.original(piece.name) == original
            seen.add(piece.name)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert seen == set(state) - tied


@pytest.mark.parametrize("name", ["chatglm", "qwen", "baichuan-13b", "yi"])
def test_shards_and_pickles_hold_the_same_model(name: str, tmp_path: Path) -> None:
    whole = logits(load(make(name, tmp_path / "whole")))
    sharded = make(name, tmp_path / "sharded", shards=3)
    pickled = make(name, tmp_path / "pickled", pickled=True)
    both = make(name, tmp_path / "both", pickled=True, shards=2)
    for folder in (sharded, pickled, both):
        assert torch.equal(logits(load(folder)), whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_nf4_and_lora_reach_every_linear_layer_but_the_head(name: str, tmp_path: Path) -> None:
    plain = load(make(name, tmp_path))
    names = linear_names(plain)
    quantised = load(tmp_path, quantization="nf4")
    modules = dict(quantised.named_modules())
    assert all("Linear4bit" in type(modules[n]).__name__ for n in names)
    assert linear_names(quantised) == names
    per_layer = {"chatglm": 6, "starcoder": 4}.get(name, 7)
    assert len(names) == LAYERS * per_layer
    adapted = attach(plain, LoraSection(r=2), seed=0)
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == len(names)


@pytest.mark.parametrize("name", CONVERTED)
def test_int8_stays_near_the_exact_model(name: str, tmp_path: Path) -> None:
    exact = logits(load(make(name, tmp_path)))
    near = logits(load(tmp_path, quantization="int8"))
    assert 0 < (near - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("name", CONVERTED)
def test_saved_in_full_is_the_original_byte_for_byte(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path / "base", shards=2)
    for file in ("modeling_it.py", "tokenizer.model", "tokenizer_config.json"):
        (base / file).write_bytes(b"{}\x00not read" + file.encode())
    model = load(base, head_trained=True)
    save_full(model, base, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {n: t for n, t in tensors(name).items() if not n.endswith("inv_freq")}
    assert set(written) == set(expected)
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    for file in ("modeling_it.py", "tokenizer.model", "tokenizer_config.json", "config.json"):
        assert digest(tmp_path / "out" / file) == digest(base / file)


def test_another_type_is_stated_and_nothing_else_changes(tmp_path: Path) -> None:
    import json

    base = make("chatglm", tmp_path / "base")
    save_full(load(base, dtype="bfloat16"), base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIGS["chatglm"] | {"torch_dtype": "bfloat16"}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
