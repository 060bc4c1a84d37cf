"""Out of memory: found before the first step without a trace, and answered by the same steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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
from raytune_ft.training.batching import steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.guarding import dry_step
from raytune_ft.training.guarding.failures import Retry
from raytune_ft.training.guarding.room import FILE, Room
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.run_folder import read_json
from raytune_ft.training.saving.checkpoint import TrainState
from tests.conftest import write_chats

LENGTH = 48
OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.25 GiB is free. Including non-PyTorch memory, this process has 77.86 GiB memory in "
    "use. Of the allocated memory 70.00 GiB is allocated by PyTorch"
)
"""torch 2.13's words."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("oom") / "rows.jsonl", 48)


def recipe_of(rows: Path, model: Path, **train_section: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": str(rows)}], "max_length": LENGTH, "window": 16},
        "train": {"epochs": 2, "micro_batch_size": 4, "accumulation": 2, "lr": 5e-3,
                  "deepspeed": "none", "on_oom": "halve", **train_section},
        "chat_eval": {"every": None},
    })  # fmt: skip


@contextmanager
def holding(engine: Engine, most_tokens: int, from_call: int = 0) -> Iterator[list[int]]:
    """Stand for a device that holds a batch of so many tokens; notes the batches that fit."""
    sizes: list[int] = []
    calls = iter(range(10**6))

    def check(_module: Any, _args: Any, batch: dict[str, torch.Tensor]) -> None:
        size = batch["input_ids"].numel()
        if size > most_tokens and next(calls) >= from_call:
            raise torch.OutOfMemoryError(OF_A_GPU)
        sizes.append(size)

    hook = engine.module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


class Run:
    """A run of the real loop, engine and stream in this process."""

    def __init__(self, recipe: Recipe, model: Path, folder: Path | None = None) -> None:
        self.told: list[str] = []
        self.losses: list[float] = []
        self.room = Room.of(recipe, folder, self.told.append)
        self.recipe = self.room.fitting()
        self.engine, _ = build_engine(self.recipe, model, torch.device("cpu"))
        self.tokenizer = TextTokenizer.from_folder(model)

    def packs(self) -> Iterator[Placed]:
        rows = sources.open_sources(self.recipe.data, self.recipe.train.seed)
        encoder = Encoder.of(self.recipe, self.tokenizer)
        return iter_packs(make_feed(rows, encoder, self.recipe.train.seed), epochs=2)

    def train(self) -> dict[str, torch.Tensor]:
        def emit(kind: str, **fields: Any) -> None:
            if kind == "step":
                self.losses.append(fields["loss"])

        hooks = Hooks(
            sample=lambda _step, _when: None, validate=lambda _: None, benchmark=lambda _: None,
            record=lambda _state, _steps: None, save=lambda _: None, interrupted=lambda: False,
        )  # fmt: skip
        batches = steps(self.packs(), self.room, rank=0, workers=1)
        train(self.engine, self.recipe, batches, TrainState(), None, hooks, emit, None, self.room)
        return self.engine.weights()


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def halved(rows: Path, tiny_model: Path) -> Run:
    """A run that begins with the halved setting."""
    run = Run(recipe_of(rows, tiny_model, micro_batch_size=2, accumulation=4), tiny_model)
    run.weights = run.train()  # type: ignore[attr-defined]
    return run


def test_a_dry_step_leaves_no_trace(rows: Path, tiny_model: Path) -> None:
    recipe = recipe_of(rows, tiny_model)
    with_it, without = Run(recipe, tiny_model), Run(recipe, tiny_model)
    state = copy.deepcopy(with_it.engine.optimizer_state())
    random = torch.get_rng_state()
    with_it.engine.module.eval()
    with holding(with_it.engine, 10**9) as sizes:
        dry_step.find_room(with_it.engine, with_it.room)
    assert sizes == [4 * LENGTH]
    assert torch.equal(torch.get_rng_state(), random)
    assert not with_it.engine.module.training
    assert_equal(with_it.engine.optimizer_state(), state)
    assert all(p.grad is None for p in with_it.engine.module.parameters())
    assert_equal(with_it.engine.weights(), without.engine.weights())
    assert_equal(with_it.train(), without.train())
    assert with_it.losses == without.losses


def test_the_longest_batch_is_full_and_labelled_in_every_objective(
    rows: Path, tiny_model: Path
) -> None:
    for objective, segments in (("sft", 1), ("dpo", 2)):
        room = Room.of(recipe_of(rows, tiny_model, objective=objective))
        batch = dry_step.longest_batch(room, vocabulary=10)
        assert batch["input_ids"].shape == (4, LENGTH)
        assert int((batch["labels"] >= 0).sum()) == 4 * (LENGTH - segments)
        assert int(batch["max_seqlen"]) == LENGTH // segments
        assert int(batch["input_ids"].max()) == 9


def test_what_does_not_fit_is_told_before_the_first_step_with_what_to_change(
    rows: Path, tiny_model: Path
) -> None:
    run = Run(recipe_of(rows, tiny_model, on_oom="stop"), tiny_model)
    with holding(run.engine, 100), pytest.raises(MemoryPlanError) as caught:
        dry_step.find_room(run.engine, run.room)
    assert str(caught.value) == (
        "before the first step: a batch of 4 x 48 tokens does not fit into memory: asked for "
        "2.00 GiB, 77.86 GiB in use, 1.25 GiB free of 79.11 GiB; set train.micro_batch_size=2 "
        "train.accumulation=4, the same mathematics; or model.quantization=nf4; or "
        "train.optimizer=paged_adamw_32bit; or data.max_length=24"
    )


def test_halving_before_the_first_step_gives_the_run_of_the_halved_setting(
    rows: Path, tiny_model: Path, halved: Run, tmp_path: Path
) -> None:
    run = Run(recipe_of(rows, tiny_model), tiny_model, tmp_path)
    with holding(run.engine, 2 * LENGTH):
        dry_step.find_room(run.engine, run.room)
        assert_equal(run.train(), halved.weights)  # type: ignore[attr-defined]
    assert run.losses == halved.losses
    (line,) = run.told
    assert line.endswith(
        "going on with train.micro_batch_size 2 x accumulation 4 instead of 4 x 2: the same steps"
    )
    assert read_json(tmp_path / FILE)["now"] == [2, 4]
    again = Room.of(recipe_of(rows, tiny_model), tmp_path)
    assert (again.micro_batch_size, again.accumulation) == (2, 4)
    other = Room.of(recipe_of(rows, tiny_model, micro_batch_size=8, accumulation=1), tmp_path)
    assert other.micro_batch_size == 8, "what a person asks for anew goes before"


def test_halving_in_a_step_takes_it_again_from_its_beginning(rows: Path, tiny_model: Path) -> None:
    """The first steps fit, as before memory is in pieces; then a second micro-batch does not.

    Without dropout, whose draws go by micro-batches; paddings differ, so equal to rounding alone.
    """
    small = {"micro_batch_size": 2, "accumulation": 4}
    runs = [
        Run(recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"dropout": 0.0})}),
            tiny_model)
        for recipe in (recipe_of(rows, tiny_model, **small), recipe_of(rows, tiny_model))
    ]  # fmt: skip
    expected = runs[0].train()
    with holding(runs[1].engine, 2 * LENGTH, from_call=5):
        weights = runs[1].train()
    (line,) = runs[1].told
    assert line.startswith("step 3: a batch of 4 x 48 tokens (rows ")
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    for name, tensor in weights.items():
        difference = torch.linalg.norm(tensor - expected[name])
        assert difference < 1e-4 * torch.linalg.norm(tensor)


def test_a_step_taken_again_has_the_bytes_of_one_that_began_small(
    rows: Path, tiny_model: Path, halved: Run
) -> None:
    """Out of memory in the very first step, behind its first micro-batch."""
    run = Run(recipe_of(rows, tiny_model), tiny_model)
    with holding(run.engine, 2 * LENGTH, from_call=1):
        assert_equal(run.train(), halved.weights)  # type: ignore[attr-defined]
    assert run.losses == halved.losses
    assert len(run.told) == 1


def test_one_pack_that_does_not_fit_ends_the_run(rows: Path, tiny_model: Path) -> None:
    run = Run(recipe_of(rows, tiny_model), tiny_model)
    with holding(run.engine, LENGTH - 8), pytest.raises(MemoryPlanError, match=r"1 x 48 tokens"):
        dry_step.find_room(run.engine, run.room)
    assert len(run.told) == 2


def test_zero_counts_the_new_accumulation_and_starts_again_within_a_run(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """DeepSpeed cannot drop a step's gradients; the next start begins with the smaller batch."""
    started_small = Run(
        recipe_of(rows, tiny_model, deepspeed="zero2", micro_batch_size=2, accumulation=4),
        tiny_model,
    )
    expected = started_small.train()
    run = Run(recipe_of(rows, tiny_model, deepspeed="zero2"), tiny_model)
    with holding(run.engine, 2 * LENGTH):
        dry_step.find_room(run.engine, run.room)
        assert_equal(run.train(), expected)
    late = Run(recipe_of(rows, tiny_model, deepspeed="zero2"), tiny_model, tmp_path)
    with holding(late.engine, 2 * LENGTH, from_call=1), pytest.raises(Retry, match="step 1: a "):
        late.train()
    assert Room.of(late.room.recipe, tmp_path).accumulation == 4
