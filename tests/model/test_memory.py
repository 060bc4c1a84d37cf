"""The memory plan: against a measured run, exact counts, and advice that really fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config import catalog
from raytune_ft.config.estimates.peak import CUBLAS
from raytune_ft.config.schema import LoraSection, ModelSection, Recipe
from raytune_ft.model.adapter import attach
from raytune_ft.model.loading import load_model, read_config
from raytune_ft.model.memory import plan_memory, trained_parameters

INTERNLM_7B = {"model_type": "internlm", "bias": True}
GIB = 2**30


def recipe(**changes: dict[str, Any]) -> Recipe:
    """The measured run: QLoRA r=64, 2048 tokens, micro-batch 1, recomputation, no DeepSpeed."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "path": "x",
            "quantization": "nf4",
            "gradient_checkpointing": True,
            "fast_path": False,
        },
        "lora": {"r": 64, "dropout": 0.0},
        "data": {"sources": [{"path": "a.jsonl"}], "max_length": 2048},
        "train": {
            "deepspeed": "none",
            "optimizer": "paged_adamw_32bit",
            "micro_batch_size": 1,
            "layout": "recipe",
        },
    }
    return Recipe.model_validate({k: v | changes.get(k, {}) for k, v in values.items()})


def test_the_measured_7b_run() -> None:
    """8.89 GB were allocated at the peak by transformers, peft and bitsandbytes on one H200."""
    plan = plan_memory(recipe(), INTERNLM_7B, 80 * GIB)
    allocated = plan.total - plan.parts["GPU context"]
    assert allocated == pytest.approx(8.89e9, rel=0.15)  # its logits were not made in chunks
    assert plan.counts.trained == 159_907_840
    assert plan.counts.total == 7_321_948_160  # with biases and norms, counted by hand
    assert plan.fits is True
    assert plan.proposals[0].memory <= 80 * GIB


def test_alibi_keeps_a_mask_for_every_head() -> None:
    """Baichuan-13B from its original folder as from its card: 2 bytes x 40 heads x 2048 x 2048."""
    original = {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_size": 5120,
        "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13696,
        "vocab_size": 64000, "model_max_length": 4096,
    }  # fmt: skip
    bfloat16 = recipe(model={"dtype": "bfloat16"})
    folder = plan_memory(bfloat16, original, 80 * GIB)
    card = plan_memory(bfloat16, catalog.card("baichuan_13b_base").config, 80 * GIB)
    assert folder.parts["workspace"] == card.parts["workspace"]
    unpacked = 5120 * 13696 * (2 + 2 / 16)  # with its scales, in float32, twice
    assert folder.parts["workspace"] - unpacked - CUBLAS == 2 * 40 * 2048**2


def test_without_recomputation_activations_rule() -> None:
    kept = plan_memory(recipe(model={"gradient_checkpointing": False}), INTERNLM_7B, 80 * GIB)
    again = plan_memory(recipe(), INTERNLM_7B, 80 * GIB)
    assert kept.parts["activations"] > 10 * again.parts["activations"]


def test_counts_are_those_of_the_loaded_model(tiny_model: Path) -> None:
    section = ModelSection(path=str(tiny_model))
    small = recipe(lora={"r": 4, "use_dora": True, "targets": ["q_proj", "down_proj"]})
    model = attach(load_model(tiny_model, section, torch.device("cpu")), small.lora, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = read_config(tiny_model)
    assert trained_parameters(small, config) == trained
    plan = plan_memory(small, config, None)
    assert (
        plan.counts.total == sum(p.numel() for p in model.get_base_model().parameters()) - trained
    )
    assert plan.fits is None


def test_modules_to_save_and_full_training_are_counted(tiny_model: Path) -> None:
    config = read_config(tiny_model)
    section = ModelSection(path=str(tiny_model))
    lora = LoraSection(r=2, modules_to_save=["lm_head"])
    model = attach(load_model(tiny_model, section, torch.device("cpu")), lora, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(recipe(lora=lora.model_dump()), config) == trained
    full = recipe(model={"method": "full", "quantization": "none"})
    assert trained_parameters(full, config) == plan_memory(full, config, None).counts.total


ROOMY: dict[str, dict[str, Any]] = {
    "model": {"quantization": "none", "gradient_checkpointing": False},
    "data": {"max_length": 4096},
    "train": {"micro_batch_size": 4, "optimizer": "adamw"},
}


@pytest.mark.parametrize("gib", [4, 8, 12, 16, 24, 40])
def test_a_plan_that_does_not_fit_proposes_what_does(gib: int) -> None:
    plan = plan_memory(recipe(**ROOMY), INTERNLM_7B, gib * GIB)
    assert plan.fits is False
    assert bool(plan.proposals) is (gib > 4)
    for one in plan.proposals:
        assert plan_memory(one.recipe, INTERNLM_7B, gib * GIB).fits, one.line


@settings(max_examples=25, deadline=None)
@given(length=st.integers(64, 4096), batch=st.integers(1, 8), rank=st.sampled_from([1, 8, 64]))
def test_more_of_anything_needs_more(length: int, batch: int, rank: int) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 500,
        "intermediate_size": 128, "num_attention_heads": 4,
    }  # fmt: skip

    def total(length: int, batch: int, rank: int, storage: str) -> int:
        changed = recipe(
            model={"quantization": storage}, data={"max_length": length},
            train={"micro_batch_size": batch}, lora={"r": rank},
        )  # fmt: skip
        return plan_memory(changed, config, GIB).total

    base = total(length, batch, rank, "int8")
    assert base < total(length + 1, batch, rank, "int8")
    assert base < total(length, batch + 1, rank, "int8")
    assert base < total(length, batch, rank + 1, "int8")
    assert total(length, batch, rank, "nf4") < base
