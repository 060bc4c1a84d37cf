"""Presets have the reference's values; a user's file is followed, or refused by the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.config.zero import PRESETS, read
from raytune_ft.errors import RecipeError
from raytune_ft.training import presets
from tests.config.test_catalog import FACTS
from tests.config.test_pairs import REFUSED
from tests.training.engines import CPU, advance
from tests.training.ragged import batches

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def recipe_of(zero: str, **train: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "m"},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {"micro_batch_size": 2, "accumulation": 3, "max_norm": 0.5, "deepspeed": zero,
                  **train},
        "run": {"workers": 2},
    })  # fmt: skip


def resolved(content: dict[str, Any], folder: Path, dtype: torch.dtype = F32) -> dict[str, Any]:
    file = folder / "mine.json"
    file.write_text(json.dumps(content))
    found = presets.resolve(recipe_of(str(file)), dtype, on_gpu=True)
    assert found is not None
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_reference_s_with_the_recipe_s_numbers(name: str) -> None:
    found = presets.resolve(recipe_of(name), BF16, on_gpu=True)
    assert found is not None
    reference = FACTS["deepspeed"][f"deepspeed_{name}"]
    assert found["zero_optimization"] == reference["zero_optimization"]
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):
        assert found[key] == reference[key]
    assert found["fp16"]["initial_scale_power"] == reference["fp16"]["initial_scale_power"]
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert "auto" not in json.dumps(found)


def test_nothing_is_overlapped_on_a_cpu() -> None:
    found = presets.resolve(recipe_of("zero2"), F32, on_gpu=False)
    assert found is not None and found["zero_optimization"]["overlap_comm"] is False


def test_halves_are_added_up_in_float32(tmp_path: Path) -> None:
    for dtype in (F16, BF16):
        found = presets.resolve(recipe_of("zero2"), dtype, on_gpu=True)
        assert found is not None
        assert found["communication_data_type"] == "fp32"
        assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    own = resolved(
        {"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, tmp_path, BF16
    )
    assert own["communication_data_type"] == "bf16"


def test_auto_is_filled_or_left_to_deepspeed(tmp_path: Path) -> None:
    found = resolved(
        {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 3, "gradient_clipping": "auto",
            "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",
                                  "stage3_prefetch_bucket_size": "auto"},
        },
        tmp_path,
    )  # fmt: skip
    assert found["zero_optimization"] == {"stage": 3}
    assert found["fp16"]["hysteresis"] == 2
    assert "auto" not in json.dumps(found)


CONTRADICTIONS: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"train_micro_batch_size_per_gpu": 4}, F32, "'train_micro_batch_size_per_gpu' is 4"),
    ({"gradient_accumulation_steps": 16}, F32, "'gradient_accumulation_steps' is 16"),
    ({"gradient_clipping": 1.0}, F32, "'gradient_clipping' is 1.0"),
    ({"train_batch_size": 16}, F32, "'train_batch_size' is 16 in the file, but the recipe says 12"),
    ({"optimizer": {"type": "AdamW"}}, F32, "'optimizer': remove it"),
    ({"scheduler": {"type": "WarmupLR"}}, F32, "'scheduler': remove it"),
    ({"activation_checkpointing": {}}, F32, "model.gradient_checkpointing sets it"),
    ({"fp16": {"enabled": True}}, BF16, "'fp16.enabled' is true in the file"),
    ({"bf16": {"enabled": True}}, F32, "'bf16.enabled' is true in the file"),
    ({"bf16": {"enabled": False}}, BF16, "'bf16.enabled' is false in the file"),
    ({"fp16": {"enabled": "yes"}}, F32, "'fp16.enabled': expected true, false or"),
    ({"fp16": 1}, F32, "'fp16': expected an object"),
    ({"fp16": {"loss_scale": 128}}, F16, "'fp16.loss_scale' is fixed"),
    ({"fp16": {"initial_scale": 1}}, F16, "did you mean 'initial_scale_power'?"),
    ({"zero_optimization": {"stage": 4}}, F32, "expected 0, 1, 2 or 3, got 4"),
    ({"zero_optimization": {"stage": "2"}}, F32, "expected 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, F32, "did you mean 'overlap_comm'?"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, F32, "remove it"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, F32,
     "'zero_optimization.offload_optimizer.device': expected \"cpu\""),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, F32,
     "'zero_optimization.offload_param' needs stage 3"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, F32,
     "needs a stage"),
    ({"zero_optimisation": {"stage": 2}}, F32, "did you mean 'zero_optimization'?"),
    ({"data_types": {"buffer_dtype": "bf16"}}, BF16, "'data_types.buffer_dtype': remove it"),
    ({"flops_profiler": {}}, F32, "'flops_profiler': remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "dtype", "words"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_a_contradiction_is_refused_by_its_key(
    change: dict[str, Any], dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    content = {"zero_optimization": {"stage": 2}, **change}
    with pytest.raises(RecipeError) as refused:
        resolved(content, tmp_path, dtype)
    line = str(refused.value)
    assert line.startswith("train.deepspeed: ") and words in line and "\n" not in line
    resolved({"zero_optimization": {"stage": 2}}, tmp_path, dtype)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for text, words in (("{", "not a JSON file"), ("[1]", "expected a JSON object")):
        broken.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read(str(broken))
    with pytest.raises(RecipeError, match="neither a file nor one of zero1, zero2"):
        read("zero4")


TRAINED = [
    name for name in REFUSED
    if name not in ("8 bits under stage 3", "new tokens under stage 3", "DPO under stage 3")
]  # fmt: skip
"""Neighbours that take a step here; the others are trained in tests of their own."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_neighbour_of_a_refused_pair_takes_a_step(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    from raytune_ft.config.loader import load_recipe
    from raytune_ft.training.build import build_engine
    from tests.config.test_pairs import with_files

    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{path: {tiny_model}}}\ndata: {{sources: [{{path: rows.jsonl}}]}}\n")
    fixed = ["train.accumulation=4", "lora.r=4", "lora.dropout=0.0"]
    recipe = load_recipe(str(file), [*fixed, *with_files(REFUSED[name][2], tmp_path)])
    engine, _ = build_engine(recipe, tiny_model, CPU)
    before = engine.weights()
    norm = advance(engine, batches()[0])
    assert norm is not None and norm > 0
    assert any(not torch.equal(weight, before[n]) for n, weight in engine.weights().items())
