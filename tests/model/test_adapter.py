"""Adapters: seeded, PEFT's own format, strict on the way back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.model.adapter import attach, linear_names, load_adapter, save_adapter
from raytune_ft.model.loading import load_model
from tests.conftest import make_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 20).unsqueeze(0)


def base(folder: Path, **section: Any) -> Any:
    return load_model(folder, ModelSection.model_validate({"path": str(folder), **section}), CPU)


def trained(folder: Path, lora: LoraSection, **section: Any) -> Any:
    """An adapter whose matrices are all random: PEFT's B of zeros would prove nothing."""
    model = attach(base(folder, **section), lora, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    save_adapter(trained(tiny_model, LoraSection(r=4)), tmp_path / "adapter", str(tiny_model))
    return tmp_path / "adapter"


def test_a_new_adapter_changes_nothing_and_trains_alone(tiny_model: Path) -> None:
    plain = logits(base(tiny_model))
    model = attach(base(tiny_model), LoraSection(r=4), seed=1)
    assert torch.equal(logits(model.eval()), plain)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 14
    assert all("lora_" in name for name in names)


def digest(model: Any) -> str:
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in state.values())
    ).hexdigest()


def test_the_seed_decides_the_bytes_whatever_ran_before(tiny_model: Path) -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = digest(attach(base(tiny_model), LoraSection(r=4), seed=1))
    torch.rand(7)
    again = digest(attach(base(tiny_model), LoraSection(r=4), seed=1))
    other = digest(attach(base(tiny_model), LoraSection(r=4), seed=2))
    assert first == again != other
    torch.random.set_rng_state(state)
    attach(base(tiny_model), LoraSection(r=4), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_linear_layers_but_the_head(tiny_model: Path) -> None:
    names = linear_names(base(tiny_model))
    assert len(names) == 14
    assert "lm_head" not in names


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_adapter_weights_are_float32(tiny_model: Path, quantization: str) -> None:
    model = attach(
        base(tiny_model, quantization=quantization, dtype="bfloat16"), LoraSection(r=2), seed=0
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"targets": ["q_proj", "down_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_saved_and_loaded_answers_alike(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], quantization: str
) -> None:
    lora = LoraSection.model_validate({"r": 4, **changes})
    model = trained(tiny_model, lora, quantization=quantization)
    save_adapter(model, tmp_path, str(tiny_model))
    loaded = load_adapter(base(tiny_model, quantization=quantization), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_plain_peft_loads_the_folder(tiny_model: Path, saved: Path) -> None:
    ours = logits(load_adapter(base(tiny_model), saved))
    assert torch.equal(logits(PeftModel.from_pretrained(base(tiny_model), saved)), ours)
    assert not torch.equal(ours, logits(base(tiny_model)))
    content = json.loads((saved / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tiny_model)
    assert content["target_modules"] == sorted(content["target_modules"])
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_saving_twice_gives_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    model = trained(tiny_model, LoraSection(r=4))
    for name in ("one", "two"):
        save_adapter(model, tmp_path / name, "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def change_weights(folder: Path, kind: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["base_model.model.model.norm.lora_A.weight"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file)


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_every_tensor_must_match(tiny_model: Path, saved: Path, kind: str) -> None:
    """PEFT itself would warn and answer with a half-loaded adapter."""
    change_weights(saved, kind)
    with pytest.raises(CheckpointError, match="1 adapter tensors differ") as caught:
        load_adapter(base(tiny_model), saved)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_base_lacks(tiny_model: Path, saved: Path) -> None:
    file = saved / "adapter_config.json"
    content = json.loads(file.read_text())
    content["target_modules"].append("c_attn")
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'c_attn' is not in the model"):
        load_adapter(base(tiny_model), saved)


def test_another_base(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    make_tiny_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="14 adapter tensors differ"):
        load_adapter(base(tmp_path / "deeper"), saved)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("adapter_config.json", None, "cannot be read"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "only LORA is readable"),
        ("adapter_model.safetensors", None, "export the adapter again"),
        ("adapter_model.safetensors", "damaged", "export the adapter again"),
    ],
)
def test_damaged_folders(
    tiny_model: Path, saved: Path, file: str, content: str | None, message: str
) -> None:
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(base(tiny_model), saved)
    assert "\n" not in str(caught.value)


def test_names_that_the_model_lacks(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"lora.targets: the model has no layer 'W_pack'.*q_proj"):
        attach(base(tiny_model), LoraSection(targets=["q_proj", "W_pack"]), 0)
    with pytest.raises(RecipeError, match=r"lora.modules_to_save: the model has no module 'head'"):
        attach(base(tiny_model), LoraSection(modules_to_save=["head"]), 0)


def test_a_folder_can_be_copied(tiny_model: Path, saved: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(saved, tmp_path / "moved"))
    assert torch.equal(
        logits(load_adapter(base(tiny_model), moved)), logits(load_adapter(base(tiny_model), saved))
    )
