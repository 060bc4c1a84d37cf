"""What the fast path leaves alone: each keeps its own way, computes the same, and has one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError
from raytune_ft.model.adapter import WEIGHTS_FILE
from raytune_ft.model.fast import install, report_of
from raytune_ft.model.fastpath import attention
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.run_folder import read_json
from tests.kernels.installed import (
    CPU,
    batches,
    finish,
    gradients,
    least_cosine,
    made,
    network,
    with_adapter,
)  # fmt: skip

ALL = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj of 2 layers"
OWN = "as transformers and PEFT compute it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def same_losses(make: Callable[[bool], Any]) -> tuple[Any, ...]:
    """Compare the losses and gradients of a model made plain and fast; return the latter."""
    found = []
    for fast in (False, True):
        one = make(fast)
        batches()[1].loss(one[1]).backward()
        found.append(gradients(one[0]))
    assert least_cosine(found[1], found[0]) > 0.99999
    return one  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("lora", "line", "linear"),
    [
        ({"use_dora": True}, f"{ALL}: DoRA; {OWN}", 0),
        ({"bias": "lora_only"}, "q_proj, k_proj, v_proj, o_proj of 2 layers: its bias", 6),
        ({"targets": ["q_proj", "v_proj", "down_proj"]}, None, 14),
        ({"targets": ["q_proj"], "modules_to_save": ["v_proj"]}, "v_proj of 2 layers", 12),
        ({"use_rslora": True, "init_lora_weights": "pissa"}, None, 14),
    ],
)
def test_adapters(lora: dict[str, Any], line: str | None, linear: int, folder: Path) -> None:
    _, _, report = same_losses(lambda fast: made("internlm", folder, fast, **lora))
    assert report.counts["linear"] == linear
    assert report.counts["attention"] == report.counts["mlp"] == 2
    assert [text[: len(line or "")] for text in report.plain] == ([line] if line else [])


def test_int8_bases(folder: Path) -> None:
    def make(fast: bool) -> Any:
        return finish(with_adapter(network("internlm", folder, quantization="int8")), fast)

    assert same_losses(make)[2].plain == (f"{ALL}: int8 base; {OWN}",)


@pytest.mark.parametrize(
    ("dtype", "sharded", "reason"),
    [("float64", False, "float64 is for proofs"), ("float32", True, "ZeRO-3 parts its weights")],
)
def test_whole_models(dtype: str, sharded: bool, reason: str, folder: Path) -> None:
    model = network("internlm", folder).to(getattr(torch, dtype))
    report = install(model, CPU, True, sharded=sharded)
    assert not report.is_on and not report.packed
    assert report.lines() == [line for line in report.lines() if reason in line] != []


def test_off_by_itself_on_a_cpu(folder: Path) -> None:
    model = network("internlm", folder)
    before = [type(module) for module in model.modules()]
    for wanted in ("auto", False):
        assert install(model, CPU, wanted).lines() == []  # type: ignore[arg-type]
    assert [type(module) for module in model.modules()] == before


def test_another_activation(folder: Path) -> None:
    def make(fast: bool) -> Any:
        model = with_adapter(network("Llama", folder))
        for layer in model.base_model.model.model.layers:
            layer.mlp.act_fn = nn.Tanh()
        return finish(model, fast)

    report = same_losses(make)[2]
    assert report.counts["mlp"] == 0 and report.counts["linear"] == 21
    assert report.plain == (f"mlp of 3 layers: activation Tanh; {OWN}",)


@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_capped_scores_that_drop_and_unknown_classes(name: str, folder: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    from tests.kernels import installed

    def make(fast: bool) -> Any:
        if name == "Granite":
            torch.manual_seed(0)
            config = GraniteConfig(**installed.SIZE, logits_scaling=2.0, residual_multiplier=0.5)
            return finish(with_adapter(GraniteForCausalLM(config).requires_grad_(False)), fast)
        model = network("Gemma2", folder)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 1e-9
        return finish(with_adapter(model), fast)

    report = same_losses(make)[2]
    assert not report.packed and report.counts["linear"] == 21
    assert report.counts["layers"] == (3 if name == "Gemma2" else 0)
    expected = "capped scores with dropout" if name == "Gemma2" else "GraniteAttention has no fast"
    assert any(expected in line for line in report.plain)


def test_one_block_of_three_keeps_its_own_way(folder: Path) -> None:
    """It gets its mask, the others the bounds."""

    def make(fast: bool) -> Any:
        model = with_adapter(network("Mistral", folder))
        model.base_model.model.model.layers[1].self_attn.is_causal = False
        return finish(model, fast)

    report = same_losses(make)[2]
    assert (report.counts["attention"], report.counts["layers"], report.packed) == (2, 3, False)
    assert report.plain == (f"attention of 1 layer: attention to later tokens; {OWN}",)


def switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: Any) -> None:
    model.merge_adapter()


def second(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")


def hooked(model: Any) -> None:
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.k_proj.register_forward_hook(lambda _m, _x, output: output * 2)
    layer.mlp.up_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))


def unfrozen(model: Any) -> None:
    model.requires_grad_(True)


@pytest.mark.parametrize("change", [switched_off, merged, second, hooked, unfrozen])
def test_what_changes_later_is_seen(change: Callable[[Any], None], folder: Path) -> None:
    """Changes behind the fast path's back; where no gradient is left, losses are compared."""
    found = []
    for fast in (False, True):
        model, loss, _ = made("internlm", folder, fast)
        torch.manual_seed(0)
        change(model)
        value = batches()[0].loss(loss)
        if value.requires_grad:
            value.backward()
        found.append((value.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    if found[0][1]:
        assert least_cosine(found[1][1], found[0][1]) > 0.99999


def test_a_form_that_computes_something_else_is_taken_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of classes is wrong for LlamaAttention here: neighbours would turn together."""
    monkeypatch.setitem(attention.KINDS, "LlamaAttention", attention.GLM)
    model, _, report = made("internlm", folder, True)
    assert report.counts == {"layers": 0, "attention": 0, "mlp": 0, "norms": 1, "linear": 0}
    assert "LlamaDecoderLayer of 2 layers: its fast form differs by" in report.plain[0]
    plain = made("internlm", folder, False)[0]
    assert [type(m) for m in model.base_model.model.model.layers.modules()] == [
        type(m) for m in plain.base_model.model.model.layers.modules()
    ]
    losses = [batches()[1].loss(TokenLoss(one, report)).item() for one in (model, plain)]
    assert losses[0] == losses[1]


def test_a_run_goes_on_to_the_same_bytes_and_by_the_same_way_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    from tests.conftest import write_chats
    from tests.training.test_worker import cut_back, train

    rows = write_chats(tmp_path / "train.jsonl", 12)
    content = {
        "model": {"path": str(tiny_model), "quantization": "nf4", "fast_path": True},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
        "train": {"max_steps": 3, "accumulation": 2, "lr": 5e-3, "deepspeed": "zero2"},
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None, "prompts": ["question 3?"], "max_new_tokens": 3},
        "run": {"trackers": []},
    }
    run = train(Recipe.model_validate(content), tmp_path / "run")
    assert read_json(run.run_json)["fast_path"][0].startswith("fast path: 2 layers, 2 attention")
    again = train(Recipe.model_validate(content), cut_back(run, tmp_path / "again", 1))
    assert (again.adapter / WEIGHTS_FILE).read_bytes() == (run.adapter / WEIGHTS_FILE).read_bytes()
    content["model"] = {**content["model"], "fast_path": False}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="other values of model"):
        train(Recipe.model_validate(content), tmp_path / "run")
    assert report_of(nn.Linear(1, 1)).lines() == []
