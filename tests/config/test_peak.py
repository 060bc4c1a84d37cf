"""Peak memory and pace: against runs measured on one H200, and against what torch itself keeps.

`h200_cells.json` has what `python -m benchmarks.memory_plan` printed there on 2026-11-26: peaks by
torch's allocator, in bytes, what the device lost beside it, and seconds of a micro-step, the median
of each of up to three runs, since a machine's host is not always equally fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory_plan import all_cells, recipe_of
from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import Counts, bucket_elements, count
from raytune_ft.config.estimates.pace import (
    DEVICES,
    device_called,
    epoch_seconds,
    micro_seconds,
    sides,
)
from raytune_ft.config.estimates.peak import host_bytes, kept_per_token, memory_bytes
from raytune_ft.config.estimates.setting import Setting, zero_of
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe

CELLS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "h200_cells.json").read_text(encoding="utf-8")
)
NOT_COUNTED = {"nf4,2048,1,on,zero2_offload,train.optimizer=adamw": 0.16}
"""Gradients on their way to the host take time that is not predicted."""
NAMES = [f"{cell['model']}: {cell['cell']}" for cell in CELLS]


def planned(cell: dict[str, Any]) -> tuple[Recipe, Counts]:
    recipe, shape = recipe_of(
        cell["cell"], argparse.Namespace(model=cell["model"], layers=None, shrink=1)
    )
    return recipe, count(shape, recipe)


def test_the_cells_are_those_of_the_goal() -> None:
    measured = {cell["cell"] for cell in CELLS if cell["model"] == "internlm_7b"}
    assert measured >= set(all_cells())


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_peaks_are_within_5_percent_of_measured_ones(cell: dict[str, Any]) -> None:
    recipe, counts = planned(cell)
    parts = memory_bytes(recipe, counts, on_gpu=True)
    context = parts.pop("GPU context")
    assert sum(parts.values()) == pytest.approx(cell["peak"], rel=0.05)
    paged = host_bytes(recipe, counts).get("optimizer, paged", 0)
    assert context + paged == pytest.approx(cell["outside"], rel=0.1)


@pytest.mark.parametrize("cell", CELLS, ids=NAMES)
def test_times_are_near_measured_ones(cell: dict[str, Any]) -> None:
    recipe, counts = planned(cell)
    predicted = micro_seconds(recipe, counts, DEVICES["h200"])
    found = sides(recipe, counts, DEVICES["h200"])
    rel = 0.06 if found.device > 1.4 * found.host else NOT_COUNTED.get(cell["cell"], 0.15)
    assert predicted == pytest.approx(median(cell["micro_s"]), rel=rel)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("full", [False, True])
def test_a_layer_keeps_what_torch_keeps(tiny_model: Path, dropout: float, full: bool) -> None:
    """Counted as autograd saves it, each storage once, weights and what leaves the layer apart."""
    from raytune_ft.model.adapter import attach
    from raytune_ft.model.loading import load_model, read_config
    from raytune_ft.model.memory import Shape

    body = {
        "model": {"path": str(tiny_model), "method": "full" if full else "lora"},
        "lora": {"r": 4, "dropout": dropout},
        "data": {"sources": [{"path": "a.jsonl"}], "max_length": 64},
        "train": {"deepspeed": "none"},
    }
    recipe = Recipe.model_validate(body)
    model: Any = load_model(tiny_model, recipe.model, torch.device("cpu"))
    if full:
        model.requires_grad_(True)
    else:
        model = attach(model, recipe.lora, 0)
    model.train()
    counts = Shape(read_config(tiny_model)).counts(recipe)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer, rotary = base.model.layers[1], base.model.rotary_emb
    tokens = 64
    entering = torch.randn(1, tokens, counts.hidden, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= tokens * 4:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used twice
        return tensor

    held: list[torch.Tensor] = []
    position = rotary(entering, torch.arange(tokens).unsqueeze(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(entering, position_embeddings=position)
    for shared in position:
        kept.pop(shared.untyped_storage().data_ptr(), None)
    expected = kept_per_token(Setting(recipe, counts, on_gpu=False)) * tokens
    assert sum(kept.values()) == pytest.approx(expected, rel=0.06)


def total(name: str, *words: str) -> int:
    recipe = load_recipe(name, list(words))
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    return sum(memory_bytes(recipe, count(shape, recipe), on_gpu=True).values())


QLORA, FULL = "llama2_7b_qlora_oasst1_e3", "llama2_7b_full_oasst1_e3"


def test_what_is_spread_offloaded_or_shrunk_takes_less() -> None:
    eight = "run.workers=8"
    by_stage = [total(FULL, eight, f"train.deepspeed={z}") for z in ("none", "zero2", "zero3")]
    assert by_stage == sorted(by_stage, reverse=True)
    assert total(FULL, "train.deepspeed=zero2_offload") < total(FULL, "train.deepspeed=zero2")
    plain = "train.deepspeed=none"
    sizes = [
        total(FULL, plain, f"train.optimizer={name}") for name in ("adamw", "muon", "adamw_8bit")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert total(FULL, plain, "train.optimizer=lion") < sizes[1]  # paged: on the host if need be


def test_the_start_of_dpo_is_kept_and_orpo_has_none() -> None:
    extra = total(QLORA, "train.objective=dpo") - total(QLORA)
    assert extra == 2 * 159_907_840
    assert total(QLORA, "train.objective=orpo") == total(QLORA)


def test_the_host_keeps_what_the_gpu_does_not() -> None:
    recipe = load_recipe(FULL, ["train.deepspeed=zero2_offload", "train.optimizer=adamw"])
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    counts = count(shape, recipe)
    # float32 weights, two averages and gradients, and a bfloat16 copy
    assert host_bytes(recipe, counts) == {"optimizer on the host": 18 * counts.trained}
    assert memory_bytes(recipe, counts, on_gpu=True).get("optimizer") is None


def test_a_user_s_deepspeed_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    block = {"stage": 3, "reduce_bucket_size": 7_000_000, "offload_param": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": block}))
    found = zero_of(str(file))
    assert (found.stage, found.bucket, found.weights_on_host) == (3, 7_000_000, True)
    assert not found.optimizer_on_host


@given(st.integers(1, 10**11))
def test_buckets_never_outgrow_deepspeed_s_own(trained: int) -> None:
    assert 1 <= bucket_elements(trained) <= 500_000_000
    assert bucket_elements(trained) * 8 >= min(trained, 4_000_000_000)


@settings(max_examples=30, deadline=None)
@given(length=st.sampled_from([512, 1024, 2048, 4096]), micro=st.sampled_from([1, 2, 4]))
def test_larger_micro_steps_take_longer_and_more_but_epochs_less(length: int, micro: int) -> None:
    def of(length: int, micro: int) -> tuple[float, float, int]:
        words = [f"data.max_length={length}", f"train.micro_batch_size={micro}"]
        recipe = load_recipe(QLORA, ["model.fast_path=false", *words])  # no tiles: all go on alike
        shape = catalog.card_config(recipe.model.path)
        assert shape is not None
        counts, device = count(shape, recipe), DEVICES["h200"]
        size = sum(memory_bytes(recipe, counts, on_gpu=True).values())
        packs = 10_000 * 512 / length
        one = micro_seconds(recipe, counts, device)
        return one, epoch_seconds(recipe, counts, device, packs), size

    small, large = of(length, micro), of(length, 2 * micro)
    assert small[0] < large[0] < 2.01 * small[0]
    assert large[1] <= small[1] * 1.001
    assert small[2] < large[2]


@pytest.mark.parametrize(
    ("said", "known"),
    [("NVIDIA H200", "H200"), ("h200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"),
     ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA L40S", "L40S"),
     ("NVIDIA L4", "L4"), ("NVIDIA A100-SXM4-80GB", "A100"), ("voodoo2", None)],
)  # fmt: skip
def test_devices_by_the_driver_s_names(said: str, known: str | None) -> None:
    found = device_called(said)
    assert (found.name if found else None) == known
