"""Merging: the merged folder answers as base plus adapter, in plain transformers."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.adapter import merge_to, save_adapter
from raytune_ft.model.original import Original
from raytune_ft.model.tensors import ShardWriter, size_bytes, stream_tensors
from tests.conftest import make_tiny_model
from tests.model.test_adapter import base, logits, trained


def make_model(folder: Path, **changes: int) -> None:
    folder.mkdir()
    make_tiny_model(folder, **changes)


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"targets": ["q_proj", "down_proj"]},
        {"targets": ["q_proj", "lm_head"]},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
@pytest.mark.parametrize("tied", [0, 1])
def test_merged_answers_as_base_plus_adapter(
    tmp_path: Path, changes: dict[str, Any], tied: int
) -> None:
    """float32: only the order of additions differs, so 1e-5 is enough."""
    make_model(tmp_path / "base", tie_word_embeddings=bool(tied))
    model = trained(tmp_path / "base", LoraSection.model_validate({"r": 4, **changes}))
    save_adapter(model, tmp_path / "adapter", "base")
    report = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = logits(model)
    assert not torch.allclose(expected, logits(base(tmp_path / "base")), atol=1e-3)
    torch.testing.assert_close(merged_logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert not report.in_memory
    untied = "lm_head" in str(changes)  # the trained head is no longer the embedding
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is bool(tied and not untied)


@pytest.fixture
def nf4_run(tiny_model: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Adapter trained on NF4 weights; the logits that training saw."""
    model = trained(tiny_model, LoraSection(r=4, targets=["q_proj"]), quantization="nf4")
    save_adapter(model, tmp_path / "adapter", "base")
    return tmp_path / "adapter", logits(model)


def test_dequantized_base_is_what_training_saw(
    tiny_model: Path, tmp_path: Path, nf4_run: tuple[Path, torch.Tensor]
) -> None:
    """All linear layers pass through NF4, also those without an adapter."""
    adapter, seen = nf4_run
    merge_to(tiny_model, adapter, tmp_path / "dequantized", base="dequantized")
    merge_to(tiny_model, adapter, tmp_path / "original")
    torch.testing.assert_close(merged_logits(tmp_path / "dequantized"), seen, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged_logits(tmp_path / "original"), seen, atol=1e-3)


@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantized_weights_are_the_loaded_ones(
    tiny_model: Path, tmp_path: Path, double_quant: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    section = ModelSection(path="x", quantization="nf4", double_quant=double_quant)
    save_adapter(trained(tiny_model, LoraSection(r=2, targets=["q_proj"])), tmp_path / "a", "b")
    merge_to(tiny_model, tmp_path / "a", tmp_path / "out", base="dequantized", section=section)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    loaded = base(tiny_model, quantization="nf4", double_quant=double_quant)
    names = Original.of(tiny_model).linear_names()
    assert len(names) == 14
    for name, parameter in loaded.named_parameters():
        if name.endswith("q_proj.weight"):
            continue
        exact = name not in names
        seen = parameter if exact else dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(merged[name], seen), name


def test_other_types_and_files_are_kept(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    model = base(tmp_path / "base", dtype="bfloat16")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("of the base")
    save_adapter(trained(tmp_path / "base", LoraSection(r=4)), tmp_path / "adapter", "base")
    report = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "100KB")
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == report.n_shards > 1
    tensors = {k: v for f in files for k, v in load_file(out / f).items()}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert set(tensors) == set(index["weight_map"])
    assert report.n_merged == 14
    assert all((out / f).stat().st_size < 110_000 for f in files)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not (out / "README.md").exists()
    assert (out / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_a_base_without_the_targets(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(trained(tiny_model, LoraSection(r=4)), tmp_path / "adapter", "base")
    make_model(tmp_path / "wide", hidden_size=32)
    make_model(tmp_path / "short", num_hidden_layers=1)
    for other in ("wide", "short"):
        with pytest.raises(ModelError, match=r"adapter target .* in this base") as caught:
            merge_to(tmp_path / other, tmp_path / "adapter", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "short", "wide"]


def test_bad_arguments(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(RecipeError, match="not empty"):
        merge_to(tiny_model, tmp_path, tmp_path / "out")
    with pytest.raises(RecipeError, match="use original or dequantized"):
        merge_to(tiny_model, tmp_path, tmp_path / "new", base="nf4")


@pytest.mark.parametrize(
    "text, size", [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("500mb", 5 * 10**8), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-2GB", "0GB", "2XB", "2GB!"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="not a size"):
        size_bytes(text)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(4, 200))
def test_shards_hold_everything_once_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, limit)
    tensors = {f"t{i}": torch.full((n,), float(i)) for i, n in enumerate(lengths)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    count = writer.close()
    shards = [load_file(f) for f in sorted(folder.glob("*.safetensors"))]
    assert len(shards) == count
    for shard in shards:
        size = sum(4 * t.numel() for t in shard.values())
        assert size <= limit or len(shard) == 1
    found = {k: v for shard in shards for k, v in shard.items()}
    assert sum(map(len, shards)) == len(found) == len(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}])
def test_one_tensor_is_held_at_a_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Of those that were written none is left when the next one comes."""
    save_adapter(
        trained(tiny_model, LoraSection.model_validate({"r": 4, **changes})), tmp_path / "a", "b"
    )
    alive: list[weakref.ref[torch.Tensor]] = []
    most, real = 0, ShardWriter.add

    def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(tensor))
        real(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    report = merge_to(tiny_model, tmp_path / "a", tmp_path / "out")
    assert len(alive) == report.n_tensors == 21
    assert most == 0


def test_a_head_longer_than_its_room(tmp_path: Path) -> None:
    """Many small tensors of long names: what was written moves back."""
    writer = ShardWriter(tmp_path, 10**6)
    tensors = {f"{'long' * 20}.{i}": torch.full((i % 5,), float(i)) for i in range(90)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert writer.close() == 1
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(
        torch.equal(tensor, tensors[name])
        for name, tensor in stream_tensors([tmp_path / "model.safetensors"])
    )


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda content: content[:-9], "is cut off; copy the file again"),
        (lambda content: b"\xff" * 8 + content[8:], "cannot be read"),
        (lambda content: content.replace(b'"F32"', b'"X32"'), "tensors of type X32"),
        (lambda _content: b"", "cannot be read"),
    ],
)
def test_damaged_bases_are_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    make_model(tmp_path / "base")
    save_adapter(trained(tmp_path / "base", LoraSection(r=2)), tmp_path / "a", "b")
    file = tmp_path / "base/model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=says) as caught:
        merge_to(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_an_adapter_that_does_not_fit_itself(tiny_model: Path, tmp_path: Path) -> None:
    """A of another rank than B, and DoRA lengths of another number."""
    save_adapter(trained(tiny_model, LoraSection(r=4, use_dora=True)), tmp_path / "a", "b")
    file = tmp_path / "a/adapter_model.safetensors"
    good = load_file(file)
    for end in ("lora_A.weight", "lora_magnitude_vector"):
        name = next(key for key in good if key.endswith(f"q_proj.{end}"))
        save_file({**good, name: good[name][1:].contiguous()}, file)
        with pytest.raises(ModelError, match=r"adapter target .*q_proj.weight' .* does not fit"):
            merge_to(tiny_model, tmp_path / "a", tmp_path / "out")
