"""The end of a run: what happens at it once, and what ends it early."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import Interrupted, TrainingError
from raytune_ft.training.batching import StepData, TensorBatch, steps
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.saving.checkpoint import TrainState
from tests.conftest import write_chats
from tests.training.recorded import EPOCHS, Recorder, feed_of, go, quiet_hooks, recipe_of


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(tiny_model)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety ragged chats: six windows of 16 rows."""
    return write_chats(tmp_path_factory.mktemp("loop") / "rows.jsonl", 90)


def test_what_ends_a_run_happens_once(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    recipe = recipe_of(rows, tiny_model, {})
    feed = feed_of(recipe, tokenizer)
    run = go(recipe, feed)
    last = len(run.rates)
    ends = [e["step"] for e in run.steps if float(e["progress"]).is_integer()]
    assert len(ends) == EPOCHS and ends[-1] == last
    for name in ("validate", "benchmark", "save"):
        assert [step for kind, step in run.calls if kind == name] == ends, name
    assert run.calls[0] == ("before", 0)
    assert run.calls[-1] == ("after", last)
    assert [kind for kind, _ in run.calls].count("after") == 1
    assert [e["share"] for e in run.steps if e["share"] == 1.0] == [1.0], "the last one alone"
    assert run.steps[-1]["total"] == last and run.steps[-1]["exact"]
    assert not any(e["exact"] for e in run.steps[:-1])
    told = [e["total"] for e in run.steps[2:]]
    assert max(abs(total - last) for total in told) <= 2, told


def test_a_finished_run_does_nothing_but_answer_again(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    recipe = recipe_of(rows, tiny_model, {})
    feed = feed_of(recipe, tokenizer)
    run = go(recipe, feed)
    again = go(recipe, feed, start=run.saved[len(run.rates)])
    assert again.calls == [("after", len(run.rates))]
    assert again.state == run.state


def test_max_steps_ends_a_run_inside_an_epoch(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    recipe = recipe_of(rows, tiny_model, {}, max_steps=2)
    run = go(recipe, feed_of(recipe, tokenizer))
    assert [e["step"] for e in run.steps] == [1, 2]
    assert run.calls == [
        ("before", 0), ("validate", 2), ("benchmark", 2), ("record", 2), ("save", 2), ("after", 2),
    ]  # fmt: skip
    assert run.state.epoch == 0 and run.state.progress < 1
    assert [(e["total"], e["exact"]) for e in run.steps] == [(2, True), (2, True)]


def test_an_interrupted_run_saves_behind_its_last_step_and_goes_on_as_if_it_had_not_been(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    """Asked during step 3: that one is saved, once, and no further one is begun."""
    recipe = recipe_of(rows, tiny_model, {}, warmup_steps=5)
    feed, whole = feed_of(recipe, tokenizer), go(recipe, feed_of(recipe, tokenizer))
    saved: list[TrainState] = []
    state, engine = TrainState(), Recorder()
    hooks = quiet_hooks(
        save=lambda at: saved.append(copy.deepcopy(at)), interrupted=lambda: state.step >= 3
    )
    packs = iter_packs(feed, epochs=EPOCHS)
    batches = steps(packs, recipe.train, rank=0, workers=1)
    with pytest.raises(Interrupted, match=r"^stopped after step 3$"):
        train(engine, recipe, batches, state, None, hooks, lambda *_, **__: None)
    assert [at.step for at in saved] == [3]
    again = go(recipe, feed, start=saved[0])
    assert engine.rates + again.rates == whole.rates


def test_a_spike_stops_a_run_at_the_same_step_whenever_it_was_taken_up(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    """The losses that it is compared with stand in the checkpoint."""
    recipe = recipe_of(rows, tiny_model, {}, loss_spike=3.0)
    feed = feed_of(recipe, tokenizer)

    class Spiking(Recorder):
        def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
            factor = 5.0 if state.step + 1 == 14 else 1.0
            return torch.tensor(factor * n_targets / recipe.train.accumulation)

    saved: dict[int, TrainState] = {}
    every = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})}
    )
    hooks = quiet_hooks(save=lambda at: saved.update({at.step: copy.deepcopy(at)}))
    for begin in (0, 11, 13):
        state = copy.deepcopy(saved[begin]) if begin else TrainState()
        packs = iter_packs(feed, Position(state.epoch, state.window, state.pack), epochs=EPOCHS)
        batches = steps(packs, recipe.train, rank=0, workers=1)
        engine = Spiking()
        with pytest.raises(TrainingError, match=r"^step 14: loss 5 is 5.0 times the usual 1 \("):
            train(engine, every, batches, state, None, hooks, lambda *_, **__: None)
        assert len(engine.rates) == 13 - begin, "the optimizer has not seen it"


def one_step(n_targets: int) -> Iterator[StepData]:
    from raytune_ft.data.report import new_report
    from raytune_ft.training.batching import empty_batch

    yield StepData(
        micro_batches=[empty_batch()], n_packs=1, n_targets=n_targets, n_tokens=2, row_ids=[7, 8],
        position=Position(1), epoch=0, progress=1.0, report=new_report(2),
    )  # fmt: skip


class Sick(Recorder):
    """An engine whose loss or gradient is no number."""

    def __init__(self, loss: float, norm: float) -> None:
        super().__init__()
        self.loss, self.norm = loss, norm

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        return torch.tensor(self.loss)

    def step(self, lr: float) -> float:
        self.rates.append(lr)
        return self.norm


@pytest.mark.parametrize(
    ("n_targets", "loss", "norm", "words", "stepped"),
    [
        (0, 1.0, 1.0, r"step 1: no token of rows \[7, 8\] is trained", 0),
        (2, math.nan, 1.0, r"step 1: loss is nan on rows \[7, 8\]", 0),
        (2, math.inf, 1.0, r"step 1: loss is inf on rows \[7, 8\]", 0),
        (2, 1.0, math.nan, r"step 1: gradient norm is nan on rows \[7, 8\]", 1),
    ],
)
def test_what_is_no_number_ends_the_run_and_is_never_written_down(
    rows: Path, tiny_model: Path, n_targets: int, loss: float, norm: float, words: str, stepped: int
) -> None:
    """An all-masked step as well: no loss is made up for it, and no checkpoint is written."""
    seen: list[str] = []

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is saved, validated or counted after it")

    hooks = Hooks(
        sample=lambda _, when: seen.append(when),
        validate=refuse, benchmark=refuse, record=refuse, save=refuse,
        interrupted=lambda: False,
    )  # fmt: skip
    engine, state = Sick(loss, norm), TrainState()
    recipe = recipe_of(rows, tiny_model, {})
    with pytest.raises(TrainingError, match=words):
        train(engine, recipe, one_step(n_targets), state, None, hooks, refuse)
    assert seen == ["before"]
    assert (state.step, len(engine.rates)) == (0, stepped)
