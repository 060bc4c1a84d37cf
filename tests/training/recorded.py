"""The loop without training: an engine that notes what it is asked, and whole runs with it.

`Recorder` stands for the engine alone, so that a hundred runs take a second; rows, packs, steps,
schedule and states are the real ones. `test_worker.py` has the same with a real model.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Window, make_feed
from raytune_ft.training.batching import TensorBatch, steps
from raytune_ft.training.engine import Engine, State
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.saving.checkpoint import TrainState

EPOCHS = 3


class Recorder(Engine):
    """Notes what the loop asks of an engine."""

    def __init__(self) -> None:
        super().__init__(nn.Module(), torch.device("cpu"))
        self.rates: list[float] = []

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        return torch.tensor(float((batch["labels"] >= 0).sum()))

    def step(self, lr: float) -> float:
        self.rates.append(lr)
        return 1.0

    def optimizer_state(self) -> State:
        return {}

    def load(self, weights: Any, state: Any) -> None:
        raise AssertionError("nothing is loaded here")

    def weights(self) -> State:
        return {}


@dataclass
class Run:
    """What happened in one run of the loop."""

    rates: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    saved: dict[int, TrainState] = field(default_factory=dict)
    state: TrainState = field(default_factory=TrainState)


def recipe_of(path: Path, tokenizer: Path, data: dict[str, Any], **train: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(tokenizer)},
        "data": {"sources": [{"path": str(path)}], "max_length": 64, "window": 16, **data},
        "train": {"epochs": EPOCHS, "accumulation": 4, "lr": 1e-3, **train},
        "chat_eval": {"every": None},
    })  # fmt: skip


class Kept(Feed):
    """Keeps its windows, which a run that is taken up thirty times makes as often."""

    def window(self, epoch: int, number: int) -> Window:
        made: dict[tuple[int, int], Window] = self.__dict__.setdefault("made", {})
        if (epoch, number) not in made:
            made[epoch, number] = super().window(epoch, number)
        return copy.deepcopy(made[epoch, number])


def feed_of(recipe: Recipe, tokenizer: TextTokenizer) -> Feed:
    source = sources.open_sources(recipe.data, recipe.train.seed)
    feed = make_feed(source, Encoder.of(recipe, tokenizer), recipe.train.seed)
    return Kept(feed.source, feed.encoder, feed.seed, feed.order)


def go(
    recipe: Recipe,
    feed: Feed,
    *,
    rank: int = 0,
    workers: int = 1,
    start: TrainState | None = None,
    total: int | None = None,
) -> Run:
    """Run the loop from a state on, as this rank of so many workers."""
    run, engine = Run(), Recorder()
    run.state = copy.deepcopy(start) if start else TrainState()

    def emit(kind: str, **fields: Any) -> None:
        if kind == "step":
            run.steps.append(fields)
        elif kind == "rows":
            run.lines.append(fields["text"])

    def note(name: str) -> Any:
        return lambda step, *_: run.calls.append((name, step))

    def save(state: TrainState) -> None:
        run.calls.append(("save", state.step))
        # as it stands in a file
        run.saved[state.step] = TrainState(**json.loads(json.dumps(vars(state))))

    hooks = Hooks(
        sample=lambda step, when: run.calls.append((when, step)),
        validate=note("validate"),
        benchmark=note("benchmark"),
        record=lambda state, _: run.calls.append(("record", state.step)),
        save=save,
        interrupted=lambda: False,
    )
    position = Position(run.state.epoch, run.state.window, run.state.pack)
    packs = iter_packs(feed, position, epochs=recipe.train.epochs)
    batches = steps(packs, recipe.train, rank=rank, workers=workers)
    train(engine, recipe, batches, run.state, total, hooks, emit)
    run.rates = engine.rates
    return run


def quiet_hooks(**given: Any) -> Hooks:
    hooks: dict[str, Any] = {
        name: lambda *_: None for name in ("sample", "validate", "benchmark", "record", "save")
    }
    return Hooks(**{**hooks, "interrupted": lambda: False, **given})
