"""Methods: whatever an adapter began with and is made of, all that reads it gives its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import RecipeError
from raytune_ft.model import beginnings
from raytune_ft.model.adapter import (
    Source,
    attach,
    keep_beginning,
    load_adapter,
    merge_to,
    save_adapter,
)
from raytune_ft.model.nf4 import mend_cpu_layers
from tests.conftest import make_tiny_model
from tests.model.test_adapter import base, digest, logits

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by steps": {"init_lora_weights": "pissa_niter_4"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa and dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "olora, few targets": {"init_lora_weights": "olora", "targets": ["q_proj", "down_proj"]},
    "eva": {"init_lora_weights": "eva"},
    "eva and dora": {"init_lora_weights": "eva", "use_dora": True},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
}
ON_NF4 = {
    **{
        name: VARIANTS[name]
        for name in ("plain", "dora", "rslora", "orthogonal", "eva", "whole head", "biases")
    },
    "loftq": {"init_lora_weights": "loftq"},
    "loftq and dora": {"init_lora_weights": "loftq", "use_dora": True},
    "loftq and rslora": {"init_lora_weights": "loftq", "use_rslora": True},
}
ON_INT8 = {name: VARIANTS[name] for name in ("plain", "rslora", "orthogonal", "gaussian")}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose linear layers have biases that are not 0."""
    folder = tmp_path_factory.mktemp("biased")
    make_tiny_model(folder, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def samples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, 250, (2, 60), generator=torch.Generator().manual_seed(3))
    one = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(60).expand(2, 60),
        "segment_ids": torch.zeros(2, 60, dtype=torch.int64),
    }
    return [one]


def section(changes: dict[str, Any]) -> LoraSection:
    return LoraSection.model_validate({"r": 4, "alpha": 8, "dropout": 0.0, **changes})


def begun(folder: Path, changes: dict[str, Any], *, seed: int = 1, **model: Any) -> Any:
    source = Source(folder, samples)
    return attach(base(folder, **model), section(changes), seed, source=source).eval()


def moved(model: Any) -> Any:
    """Change every trained weight, as steps would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """float32: only the order of additions differs."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


LONG = {"gaussian", "pissa and dora", "olora, few targets", "eva and dora", "own biases"}
"""Left to `make exact`: what others show as well."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exact if n in LONG else ()) for n in VARIANTS]
)
def test_export_and_merge_answer_as_the_trained_model(
    biased: Path, tmp_path: Path, name: str
) -> None:
    """Plain PEFT on the untouched base, our own loading, and the merged folder."""
    model = moved(begun(biased, VARIANTS[name]))
    expected = logits(model)
    assert (expected - logits(base(biased))).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter", str(biased))
    same(logits(load_adapter(base(biased), tmp_path / "adapter")), expected)
    plain = AutoModelForCausalLM.from_pretrained(biased)
    same(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)
    merge_to(biased, tmp_path / "adapter", tmp_path / "merged")
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize(
    ("name", "double_quant"),
    [*((name, True) for name in ON_NF4), ("plain", False), ("loftq", False)],
)
def test_on_nf4(biased: Path, tmp_path: Path, name: str, double_quant: bool) -> None:
    model = moved(begun(biased, ON_NF4[name], quantization="nf4", double_quant=double_quant))
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", str(biased))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(biased, quantization_config=four_bits)
    mend_cpu_layers(plain)  # or some CPUs round its scales when it answers: see model/nf4.py
    same(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)
    used = ModelSection(path=str(biased), double_quant=double_quant)
    merge_to(
        biased, tmp_path / "adapter", tmp_path / "merged", base="dequantized", section=used
    )  # fmt: skip
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("name", ON_INT8)
def test_on_int8(biased: Path, tmp_path: Path, name: str) -> None:
    model = moved(begun(biased, ON_INT8[name], quantization="int8"))
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", str(biased))
    plain = AutoModelForCausalLM.from_pretrained(
        biased, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    same(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)


STARTS = ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva"]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_beginning_changes_no_answer(biased: Path, init: str, use_dora: bool) -> None:
    model = begun(biased, {"init_lora_weights": init, "use_dora": use_dora})
    same(logits(model), logits(base(biased)))


DRAWN = {True, "gaussian", "orthogonal", "pissa_niter_4"}
"""The others look at the base or the rows alone."""


@pytest.mark.parametrize("init", [True, False, *STARTS, "loftq"])
def test_the_seed_decides_the_bytes_whatever_ran_before(biased: Path, init: bool | str) -> None:
    """C28."""
    model = {"quantization": "nf4"} if init == "loftq" else {}
    made = {"init_lora_weights": init}
    torch.manual_seed(11)
    first = digest(begun(biased, made, **model))
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert digest(begun(biased, made, **model)) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    other = digest(begun(biased, made, seed=2, **model))
    assert (other != first) is (init in DRAWN or init is False)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_itself_begins_so(biased: Path, init: str) -> None:
    from peft import LoraConfig, get_peft_model

    ours = begun(biased, {"init_lora_weights": init, "targets": ["q_proj", "up_proj"]})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=init
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(biased), config)
    expected = theirs.state_dict()
    for name, found in ours.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


def test_loftq_gives_back_the_most_that_its_rank_can(biased: Path) -> None:
    """The error that is left is the tail of the lost part's singular values (Eckart and Young)."""
    from raytune_ft.model.nf4 import dequantized

    model = begun(biased, {"init_lora_weights": "loftq", "use_rslora": True}, quantization="nf4")
    plain = base(biased)
    for name, layer in beginnings.layers_of(model):
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
        stored = layer.get_base_layer().weight
        lost = (weight - dequantized(stored.data, stored.quant_state)).double()
        left = lost - layer.get_delta_weight("default").double()
        tail = torch.linalg.svdvals(lost)[4:]
        torch.testing.assert_close(left.norm(), tail.norm(), rtol=1e-5, atol=1e-7)
        assert left.norm() < 0.95 * lost.norm()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "eva", "loftq"])
def test_a_kept_beginning_is_begun_with_again(biased: Path, tmp_path: Path, init: str) -> None:
    """As after a kill: no look at rows or files, the same bytes in adapter and base."""
    model = {"quantization": "nf4"} if init == "loftq" else {}
    first = begun(biased, {"init_lora_weights": init, "use_dora": True}, **model)
    keep_beginning(first, tmp_path / "beginning")
    lora = section({"init_lora_weights": init, "use_dora": True})
    again = attach(base(biased, **model), lora, seed=7, kept=tmp_path / "beginning")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in first.named_parameters() if p.requires_grad
    }
    expected = first.state_dict()
    for name, found in again.state_dict().items():
        assert torch.equal(found, expected[name]), name
    for one in (first, again):
        save_adapter(moved(one), tmp_path / f"adapter {one is first}", "base")
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        written = [(tmp_path / f"adapter {is_first}" / name) for is_first in (True, False)]
        assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_more_directions_than_a_layer_has(biased: Path, init: str) -> None:
    model = {"quantization": "nf4"} if init == "loftq" else {}
    with pytest.raises(RecipeError, match=r"lora.r: .*k_proj is 32 x 64, of rank 32"):
        begun(biased, {"init_lora_weights": init, "r": 40}, **model)


def test_eva_needs_as_many_tokens_as_directions(biased: Path) -> None:
    short = [{key: value[:, :5] for key, value in batch.items()} for batch in samples()]
    lora = section({"init_lora_weights": "eva", "r": 16})
    with pytest.raises(RecipeError, match="10 trained tokens and 32 directions") as caught:
        attach(base(biased), lora, 1, source=Source(biased, lambda: short))
    assert "\n" not in str(caught.value)


def test_eva_spreads_ranks_by_what_rows_excite(biased: Path) -> None:
    """All together at most as many as r gives, more of them where there is more to see."""
    layers = dict(beginnings.layers_of(begun(biased, {"init_lora_weights": "eva"})))
    ranks = {layer.r["default"] for layer in layers.values()}
    assert len(ranks) > 1
    assert sum(layer.r["default"] for layer in layers.values()) <= 14 * 4


def test_what_is_saved_says_nothing_of_how_it_began(biased: Path, tmp_path: Path) -> None:
    """PEFT would begin anew at each loading, and change the base."""
    save_adapter(begun(biased, {"init_lora_weights": "pissa", "use_rslora": True}), tmp_path, "b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["r"], config["use_rslora"]) == (8, False)
    assert config["lora_alpha"] == pytest.approx(8 * 8 / 4**0.5)
