"""Automatic layouts on the device: what is chosen for a memory runs in it, and learns the same.

The allocator is capped at what the plan was told of, less what CUDA holds beside it.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.estimates.layout import Choice, choose
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.estimates.peak import GPU_CONTEXT
from raytune_ft.config.schema import Recipe
from raytune_ft.model.loading import read_config
from raytune_ft.model.memory import Shape
from raytune_ft.training import layouts
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.guarding import dry_step
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.run_folder import RunFolder
from tests.conftest import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("whole_device"),
]
CUDA, GIB, LENGTH = torch.device("cuda", 0), 2**30, 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(
        folder, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return folder


def recipe_of(model: Path, path: str) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(model), "quantization": "nf4", "dtype": "bfloat16",
                  "fast_path": path if path == "auto" else path == "on"},
        "lora": {"r": 16, "dropout": 0.1},
        "data": {"sources": [{"path": "none.jsonl"}], "max_length": LENGTH},
        "train": {"micro_batch_size": 1, "accumulation": 16, "deepspeed": "none"},
    })  # fmt: skip


def chosen(recipe: Recipe, model: Path, gib: float) -> Choice:
    counts = Shape(read_config(model)).counts(recipe)
    return choose(recipe, counts, int(gib * GIB), DEVICES["h200"])


def built(recipe: Recipe, model: Path, choice: Choice) -> tuple[Engine, Room, list[str]]:
    told: list[str] = []
    room = Room.of(recipe, None, told.append, choice)
    engine, _ = build_engine(
        room.fitting(), model, CUDA, resident=room.is_resident, hosted=room.hosted, tell=told.append
    )
    return engine, room, told


def limit(size: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(size / whole)


@pytest.mark.parametrize("path", ["off", "auto"])
@pytest.mark.parametrize("gib", [2.5, 4, 8, 20])
def test_a_layout_runs_in_the_memory_that_it_was_chosen_for(
    path: str, gib: float, model: Path
) -> None:
    recipe = recipe_of(model, path)
    choice = chosen(recipe, model, gib)
    limit(gib * GIB - GPU_CONTEXT)
    engine, room, told = built(recipe, model, choice)
    torch.cuda.reset_peak_memory_stats()
    batch = dry_step.longest_batch(room, 100)
    dry_step.dry_step(engine, batch, recipe.train.optimizer)
    peak = torch.cuda.max_memory_allocated()
    planned = choice.memory - GPU_CONTEXT
    print(f"{gib} GiB, fast path {path}: {choice.line}; allocated {peak / GIB:.2f} GiB, "
          f"planned {planned / GIB:.2f}, ratio {planned / peak:.3f}")  # fmt: skip
    dry_step.find_room(engine, room)
    assert told == []
    assert planned == pytest.approx(peak, rel=0.15)


def test_a_choice_that_was_too_large_steps_down_in_place(model: Path) -> None:
    recipe = recipe_of(model, "auto")
    choice = chosen(recipe, model, 20)
    limit(4 * GIB)
    engine, room, told = built(recipe, model, choice)
    dry_step.find_room(engine, room)
    print("\n".join(told))
    assert told
    assert room.layout in choice.smaller


def test_layouts_have_one_loss(model: Path) -> None:
    """Without dropout, whose draws go by micro-batches; bfloat16 rounds sums of other orders."""
    recipe = recipe_of(model, "auto")
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"dropout": 0.0})})
    losses = []
    for gib in (2.5, 8, 20):
        engine, room, _ = built(recipe, model, chosen(recipe, model, gib))
        batch: Any = dry_step.longest_batch(room, 100)
        targets = int((batch["labels"] >= 0).sum()) * room.accumulation
        total = sum(
            float(engine.forward_backward(batch, targets)) for _ in range(room.accumulation)
        )
        losses.append(total / targets)
        print(room.layout, losses[-1])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-3)


def test_a_worker_decides_by_the_free_memory(model: Path, tmp_path: Path) -> None:
    folder, told = RunFolder(tmp_path), []
    folder.update(status="running")
    found = layouts.settled(recipe_of(model, "auto"), folder, model, CUDA, told.append)
    assert found is not None
    free, _ = torch.cuda.mem_get_info(CUDA)
    assert found.available == pytest.approx(free, rel=0.05)
    assert told == [f"plan    {found.line}"]
    assert layouts.settled(recipe_of(model, "auto"), folder, model, CUDA, pytest.fail) == found
