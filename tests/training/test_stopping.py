"""Best checkpoint and early stopping: scripted measurements, taken up again at every step."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import EvalSection, Recipe
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import TrainingError
from raytune_ft.training import stopping
from raytune_ft.training.batching import steps
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState
from tests.conftest import write_chats
from tests.training.recorded import Recorder, feed_of, recipe_of

SCRIPT = (5.0, 3.0, 4.0, 9.0)


@pytest.fixture(scope="module")
def setting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    """A run of many steps, measured and saved after each."""
    rows = write_chats(tmp_path_factory.mktemp("stopping") / "rows.jsonl", 60)
    recipe = recipe_of(rows, tiny_model, {"validation": 0.2})
    recipe = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1, "keep": 2})}
    )
    return recipe, feed_of(recipe, TextTokenizer.from_folder(tiny_model))


@dataclass
class Told:
    """What a run did; `saved` is what a killed one would be taken up from."""

    saved: dict[int, TrainState] = field(default_factory=dict)
    state: TrainState = field(default_factory=TrainState)


def run(
    setting: tuple[Recipe, Any],
    wanted: dict[str, Any],
    script: Sequence[float],
    start: TrainState | None = None,
    folder: Path | None = None,
) -> Told:
    """Train with the measurements of a script, its last value for all later ones."""
    recipe, feed = setting
    recipe = recipe.model_copy(update={"eval": EvalSection.model_validate({"every": 1, **wanted})})
    told = Told(state=copy.deepcopy(start) if start else TrainState())

    def validate(step: int) -> dict[str, float]:
        value = script[min(step, len(script)) - 1]
        return {"val_loss": value, "val_chrf": value}

    def save(state: TrainState) -> None:
        told.saved[state.step] = TrainState(**json.loads(json.dumps(vars(state))))
        if folder is not None:
            weights = {"w": torch.tensor([float(state.step)])}
            checkpoint.save(folder, state, weights, {"m": torch.zeros(1)}, keep=2)

    hooks = Hooks(
        sample=lambda *_: None, validate=validate, benchmark=lambda *_: None,
        record=lambda *_: None, save=save, interrupted=lambda: False,
    )  # fmt: skip
    at = Position(told.state.epoch, told.state.window, told.state.pack)
    packs = iter_packs(feed, at, epochs=recipe.train.epochs)
    batches = steps(packs, recipe.train, rank=0, workers=1)
    train(Recorder(), recipe, batches, told.state, None, hooks, lambda *_, **__: None)
    return told


CASES = [
    # (eval section, best step, best value, step of the end; None: not stopped early)
    ({"metric": "val_loss", "mode": "min"}, 2, 3.0, None),
    ({"metric": "val_loss", "mode": "min", "patience": 2}, 2, 3.0, 4),
    ({"metric": "val_loss", "mode": "min", "patience": 1}, 2, 3.0, 3),
    ({"metric": "val_loss", "mode": "min", "min_delta": 2.5}, 1, 5.0, None),
    ({"metric": "val_loss", "mode": "min", "min_delta": 2.5, "patience": 2}, 1, 5.0, 3),
    ({"metric": "val_chrf", "mode": "max"}, 4, 9.0, None),
    ({"metric": "val_chrf", "mode": "max", "patience": 2}, 1, 5.0, 3),
    ({"metric": "val_chrf", "mode": "max", "patience": 3}, 4, 9.0, 7),
]


@pytest.mark.parametrize(("wanted", "best_step", "best", "end"), CASES, ids=str)
def test_the_best_step_and_the_end_are_the_same_wherever_a_run_is_taken_up(
    setting: tuple[Recipe, Any],
    wanted: dict[str, Any],
    best_step: int,
    best: float,
    end: int | None,
) -> None:
    """5, 3, 4, 9, and 9 for ever after."""
    whole = run(setting, wanted, SCRIPT)
    assert (whole.state.best_step, whole.state.best) == (best_step, best)
    assert whole.state.stopped is (end is not None)
    assert whole.state.step == end if end is not None else whole.state.step > 8
    for step, saved in whole.saved.items():
        again = run(setting, wanted, SCRIPT, saved)
        assert again.state == whole.state, f"taken up behind step {step}"


def test_the_best_checkpoint_stays_on_disk_and_the_others_go(
    setting: tuple[Recipe, Any], tmp_path: Path
) -> None:
    whole = run(setting, {}, SCRIPT, folder=tmp_path)
    last = whole.state.step
    kept = sorted(int(f.name.removeprefix("step_")) for f in tmp_path.glob("step_*"))
    assert kept == [2, last - 1, last]
    loaded = checkpoint.load(tmp_path / checkpoint.folder_name(whole.state.best_step))
    assert loaded.weights["w"].tolist() == [2.0]


def test_patience_changed_on_the_way_decides_anew(setting: tuple[Recipe, Any]) -> None:
    """A run that was stopped early goes on with more patience, or without."""
    stopped = run(setting, {"patience": 1}, SCRIPT)
    assert (stopped.state.step, stopped.state.stopped) == (3, True)
    state = stopped.saved[3]
    assert run(setting, {"patience": 1}, SCRIPT, state).state.step == 3
    assert run(setting, {"patience": 2}, SCRIPT, state).state.step == 4
    whole = run(setting, {}, SCRIPT)
    onward = run(setting, {}, SCRIPT, state)
    assert replace(onward.state, losses=[]) == replace(whole.state, losses=[])


def test_the_best_of_one_metric_is_none_of_another(setting: tuple[Recipe, Any]) -> None:
    first = run(setting, {}, SCRIPT)
    chrf = {"metric": "val_chrf", "mode": "max"}
    again = run(setting, chrf, (*SCRIPT, 1.0, 2.0, 1.0), first.saved[4])
    assert (again.state.best_metric, again.state.best_step, again.state.best) == ("val_chrf", 6, 2)


def test_a_measurement_that_is_no_number_ends_the_run() -> None:
    with pytest.raises(TrainingError, match="val_loss of the held-out rows is not a number"):
        stopping.judge(TrainState(), {"val_loss": math.nan}, EvalSection())
    state = TrainState()
    assert stopping.judge(state, None, EvalSection()) is False
    assert state == TrainState()
