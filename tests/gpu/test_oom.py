"""Out of memory on a real device: the dry step's figures, no trace of it, and the same steps.

A batch of 4 packs is as long as the fast path takes an MLP at once: a longer one goes through it in
tiles that run again, and 4 packs of 8192 tokens take less memory than 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import MemoryPlanError
from raytune_ft.model.fastpath.blocks import LONG
from raytune_ft.training.batching import steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.guarding import dry_step
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.saving.checkpoint import TrainState
from tests.conftest import make_tiny_model, write_chats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("whole_device"),
]
CUDA = torch.device("cuda", 0)
LENGTH = LONG // 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(
        folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return folder


class Run:
    """A run on the device, of packs that are full but for a little."""

    def __init__(self, model: Path, rows: Path, **train_section: Any) -> None:
        self.told: list[str] = []
        self.losses: list[float] = []
        recipe = Recipe.model_validate({
            "model": {"path": str(model), "gradient_checkpointing": False},
            "lora": {"r": 8, "dropout": 0.1},
            "data": {"sources": [{"path": str(rows)}], "max_length": LENGTH},
            "train": {"epochs": 1, "max_steps": 2, "micro_batch_size": 4, "accumulation": 1,
                      "lr": 1e-3, "on_oom": "halve", "layout": "recipe", **train_section},
            "chat_eval": {"every": None},
        })  # fmt: skip
        self.room = Room.of(recipe, None, self.told.append)
        self.recipe = self.room.fitting()
        self.engine, _ = build_engine(self.recipe, model, CUDA)
        self.model = model

    def packs(self) -> Iterator[Placed]:
        rows = sources.open_sources(self.recipe.data, self.recipe.train.seed)
        encoder = Encoder.of(self.recipe, TextTokenizer.from_folder(self.model))
        return iter_packs(make_feed(rows, encoder, self.recipe.train.seed), epochs=1)

    def train(self) -> dict[str, torch.Tensor]:
        def emit(kind: str, **fields: Any) -> None:
            if kind == "step":
                self.losses.append(fields["loss"])

        quiet: dict[str, Any] = {
            name: lambda *_: None for name in ("sample", "validate", "benchmark", "record", "save")
        }
        hooks = Hooks(**quiet, interrupted=lambda: False)
        batches = steps(self.packs(), self.room, rank=0, workers=1)
        train(self.engine, self.recipe, batches, TrainState(), None, hooks, emit, None, self.room)
        return self.engine.weights()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("rows") / "rows.jsonl", 1200)


def peak_of(run: Run) -> int:
    """Measure what a dry step of so many packs takes, all in all."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = dry_step.longest_batch(run.room, 100)
    dry_step.dry_step(run.engine, batch, run.recipe.train.optimizer)
    return torch.cuda.max_memory_reserved()


def limit(size: int) -> None:
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(size / whole)


@pytest.mark.parametrize("deepspeed", ["none", "zero2"])
def test_a_dry_step_leaves_no_trace(deepspeed: str, model: Path, rows: Path) -> None:
    with_it = Run(model, rows, deepspeed=deepspeed)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(CUDA)
    dry_step.find_room(with_it.engine, with_it.room)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(CUDA), before[1])
    dried = with_it.engine.weights()
    without = Run(model, rows, deepspeed=deepspeed)
    assert all(torch.equal(t, dried[name]) for name, t in without.engine.weights().items())
    assert all(p.grad is None for p in with_it.engine.module.parameters())
    assert with_it.told == []
    with_it.train()
    without.train()
    assert with_it.losses == pytest.approx(without.losses, rel=1e-3)


@pytest.mark.parametrize("deepspeed", ["none", "zero2"])
def test_a_device_that_holds_half_the_batch_trains_with_half_of_it(
    deepspeed: str, model: Path, rows: Path
) -> None:
    small = Run(model, rows, deepspeed=deepspeed, micro_batch_size=2, accumulation=2)
    half = peak_of(small)
    small.train()
    large = Run(model, rows, deepspeed=deepspeed)
    whole = peak_of(large)
    print(f"{deepspeed}: {half / 2**30:.2f} GiB for 2 packs, {whole / 2**30:.2f} GiB for 4")
    assert whole > 1.5 * half
    limit((half + whole) // 2)
    dry_step.find_room(large.engine, large.room)
    (line,) = large.told
    print(line)
    assert f"a batch of 4 x {LENGTH} tokens does not fit into memory: asked for " in line
    assert " in use" in line and " allowed" in line
    assert (large.room.micro_batch_size, large.room.accumulation) == (2, 2)
    large.train()
    assert large.losses == pytest.approx(small.losses, rel=1e-3)


def test_memory_that_ends_within_a_run_halves_the_step_it_ends_in(model: Path, rows: Path) -> None:
    small = Run(model, rows, deepspeed="none", micro_batch_size=2, accumulation=2)
    half = peak_of(small)
    small.train()
    large = Run(model, rows, deepspeed="none")
    limit((half + peak_of(large)) // 2)
    large.train()
    (line,) = large.told
    assert line.startswith(f"step 1: a batch of 4 x {LENGTH} tokens ")
    assert large.losses == pytest.approx(small.losses, rel=1e-3)


def test_what_cannot_be_halved_ends_with_the_settings_that_help(model: Path, rows: Path) -> None:
    run = Run(model, rows, on_oom="stop")
    limit(peak_of(run) // 2)
    with pytest.raises(MemoryPlanError, match=r"asked for .* set train.micro_batch_size=2 "):
        dry_step.find_room(run.engine, run.room)
