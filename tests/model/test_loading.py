"""Loading: what is accepted, what each refusal says, and precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import ModelError
from raytune_ft.model.loading import compute_dtype, load_model, prepare_folder
from raytune_ft.model.silence import quiet

CPU = torch.device("cpu")
IDS = torch.arange(3, 20).unsqueeze(0)


def load(folder: Path, **section: Any) -> Any:
    return load_model(folder, ModelSection.model_validate({"path": str(folder), **section}), CPU)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_folder_is_itself(tiny_model: Path) -> None:
    assert prepare_folder(str(tiny_model)) == tiny_model.resolve()


def test_weights_are_those_of_the_file_and_frozen(tiny_model: Path) -> None:
    model = load(tiny_model)
    stored = load_file(tiny_model / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert not parameter.requires_grad
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


@pytest.mark.parametrize("quantization, kind", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantised_storage(tiny_model: Path, quantization: str, kind: str) -> None:
    """All linear layers but the head; logits stay near those of the full weights."""
    model = load(tiny_model, quantization=quantization)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert set(kinds.values()) == {kind}
    assert len(kinds) == 14
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        exact, near = load(tiny_model)(IDS).logits, model(IDS).logits
    assert 0 < (near - exact).norm() / exact.norm() < 0.3


def test_an_answer_leaves_nf4_weights_and_gradients_alone(tiny_model: Path) -> None:
    """bitsandbytes would repack the weights for inference on CPUs with AVX512-BF16."""
    model = load(tiny_model, quantization="nf4")
    first = model.model.layers[0].input_layernorm.weight.requires_grad_()

    def gradient() -> torch.Tensor:
        model.train()
        model(IDS).logits.square().sum().backward()
        assert first.grad is not None
        found = first.grad.clone()
        first.grad = None
        return found

    before = gradient()
    assert bool(before.any())
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert torch.equal(gradient(), before)


def test_auto_precision_is_float32_without_a_gpu(tiny_model: Path) -> None:
    assert compute_dtype(ModelSection(path="x"), CPU) is torch.float32
    assert load(tiny_model, dtype="bfloat16").dtype is torch.bfloat16


def test_pickled_weights_load_without_running_code(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    assert torch.equal(load(copy).lm_head.weight, tensors["lm_head.weight"])
    torch.save({"lm_head.weight": Path("/")}, copy / "pytorch_model.bin")  # not a tensor: refused
    with pytest.raises(ModelError, match=r"pytorch_model.bin: holds more than tensors \(pathlib"):
        load(copy)


REFUSALS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "no config.json"),
    ("broken config", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ("list as config", lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (
        "pointer",
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/x\n"),
        "git lfs pull",
    ),
    (
        "missing shard",
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors: missing",
    ),
    (
        "unknown family",
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="nope")),
        "no known model type 'nope'",
    ),
    (
        "quantised file",
        lambda f: edit(
            f / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})
        ),
        r"quantised already \(gptq\)",
    ),
]


@pytest.mark.parametrize("change, message", [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_unusable_folders_are_refused(
    copy: Path, change: Callable[[Path], object], message: str
) -> None:
    change(copy)
    with pytest.raises(ModelError, match=message) as caught:
        prepare_folder(str(copy))
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        prepare_folder(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        prepare_folder(str(tmp_path / "file"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="hub did not give it") as caught:
        prepare_folder("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_an_adapter_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="give its base model's folder"):
        prepare_folder(str(tmp_path))


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_tensors_must_match_the_network(copy: Path, kind: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    if kind == "unexpected":
        tensors |= {"model.norm.weight": norm, "model.extra.weight": norm.clone()}
    elif kind == "mismatched":
        tensors["model.norm.weight"] = norm[:3].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value) or "size mismatch" in str(caught.value)


def test_stored_rotary_buffers_are_ignored(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy)


def test_code_beside_the_weights_is_not_run(copy: Path) -> None:
    marker = copy / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    edit(copy / "config.json", lambda c: c.update(auto_map=names))
    load(prepare_folder(str(copy)))
    assert not marker.exists()


def test_loading_prints_nothing(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_model, quantization="nf4")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_verbosity_comes_back() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet():
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before == after
