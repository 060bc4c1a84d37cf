"""A trial that goes on as another one has its checkpoint, and a recipe to which that belongs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config import loader
from raytune_ft.errors import CheckpointError
from raytune_ft.sweeping.inheriting import Pause, inherit
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import WAITING, Trial, Turn
from raytune_ft.training.run_folder import RunFolder, append_jsonl
from raytune_ft.training.saving import checkpoint, durable, identity
from raytune_ft.training.saving.checkpoint import TrainState
from tests.sweeping.made import recipe_of

SWEEP = recipe_of({"train.lr": {"low": 1e-4, "high": 1e-2}}, tune={"scheduler": "pbt"})
VALUES = ({"train.lr": 1e-3}, {"train.lr": 2e-3})
TURN = Turn(6, 1, {"train.lr": 2.4e-3})


def made(place: Path, number: int, step: int = 6) -> Trial:
    """Make a trial's folder with checkpoints of its own, of steps 4 and `step`."""
    folder, recipe = RunFolder(place / f"trial_000{number}"), with_values(SWEEP, VALUES[number])
    folder.create(folder.path.name, loader.dump_yaml(recipe))
    for each in (4, step):
        state = TrainState(step=each, tokens=100 * each, losses=[float(number)] * each)
        state.recipe_hash, state.data_fingerprint = identity.recipe_hash(recipe), "rows"
        state.packs_per_step = recipe.global_batch_size
        tensors = {"a": torch.full((3, 2), float(number + each))}
        checkpoint.save(folder.checkpoints, state, tensors, {"a/m": tensors["a"] / 2}, keep=-1)
    return Trial(number, folder.path.name, VALUES[number], None, 6, WAITING, folder.path, 0.0)


def check_inherited(trial: Trial, source: Trial) -> None:
    own, other = RunFolder(trial.folder), RunFolder(source.folder)
    found = checkpoint.load_latest(own.checkpoints)
    assert found is not None
    theirs = checkpoint.load(other.checkpoints / "step_000006")
    assert torch.equal(found.weights["a"], theirs.weights["a"])
    assert torch.equal(found.optimizer["a/m"], theirs.optimizer["a/m"])
    recipe = loader.load_recipe(str(own.recipe))
    assert recipe.train.lr == 2.4e-3
    identity.check(found.state, recipe, "rows", "here")
    with pytest.raises(CheckpointError, match="belongs to other values"):
        identity.check(theirs.state, recipe, "rows", "here")
    assert found.state.losses == theirs.state.losses
    assert found.state.step == 6


def test_it_has_the_other_s_checkpoint_and_its_own_recipe(tmp_path: Path) -> None:
    trial, source = made(tmp_path, 0), made(tmp_path, 1)
    before = (source.folder / "checkpoints/step_000006/state.json").read_bytes()
    inherit(trial, source, TURN)
    check_inherited(trial, source)
    inherit(trial, source, TURN)  # by a driver that cannot know
    check_inherited(trial, source)
    place = source.folder / "checkpoints/step_000006"
    assert (place / "state.json").read_bytes() == before
    assert checkpoint.damage(place) is None
    assert (place / "weights.safetensors").stat().st_nlink == 2, "no tensor is written twice"
    assert sorted(p.name for p in (trial.folder / "checkpoints").iterdir()) == [
        "step_000004", "step_000006",
    ]  # fmt: skip


def test_what_the_source_removes_the_heir_keeps(tmp_path: Path) -> None:
    trial, source = made(tmp_path, 0), made(tmp_path, 1)
    inherit(trial, source, TURN)
    durable.drop(source.folder / "checkpoints/step_000006")
    assert checkpoint.damage(trial.folder / "checkpoints/step_000006") is None


def test_without_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    trial, source = made(tmp_path, 0), made(tmp_path, 1)
    monkeypatch.setattr(os, "link", refuse)
    inherit(trial, source, TURN)
    check_inherited(trial, source)
    assert (source.folder / "checkpoints/step_000006/weights.safetensors").stat().st_nlink == 1


def test_a_damaged_checkpoint_is_passed_on_to_nobody(tmp_path: Path) -> None:
    trial, source = made(tmp_path, 0), made(tmp_path, 1)
    before = json.loads((trial.folder / "checkpoints/step_000006/manifest.json").read_text())
    (source.folder / "checkpoints/step_000006/weights.safetensors").write_bytes(b"x" * 200)
    with pytest.raises(CheckpointError, match=r"weights.safetensors' .*; no other run can go on"):
        inherit(trial, source, TURN)
    assert loader.load_recipe(str(trial.folder / "recipe.yaml")).train.lr == 1e-3
    after = json.loads((trial.folder / "checkpoints/step_000006/manifest.json").read_text())
    assert after == before


CALLS = ("mkdir", "link", "open", "write", "fsync", "rename", "replace")


class KilledError(BaseException):
    """The process is gone: nothing cleans up."""


@pytest.mark.parametrize("life", range(24))
def test_stopped_at_any_call_it_is_whole_or_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: int
) -> None:
    trial, source = made(tmp_path, 0), made(tmp_path, 1)
    left = [life]

    def fragile(call: Any) -> Any:
        def counted(*arguments: Any, **words: Any) -> Any:
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return call(*arguments, **words)

        return counted

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, fragile(getattr(os, name)))
        patch.setattr("shutil.rmtree", fragile(lambda *_, **__: None))
        try:
            inherit(trial, source, TURN)
            done = True
        except KilledError:
            done = False
    place = trial.folder / "checkpoints"
    durable.tidy(place)
    for each in checkpoint.step_folders(place):
        assert checkpoint.damage(each) is None
    assert {p.name for p in checkpoint.step_folders(place)} == {"step_000004", "step_000006"}
    inherit(trial, source, TURN)
    check_inherited(trial, source)
    assert not done or life > 12


def told(folder: RunFolder) -> None:
    for step in range(1, 8):
        value = step / 10 if step % 3 == 0 else None
        append_jsonl(folder.metrics, {"step": step, "loss": 1.0, "val_loss": value})


@pytest.mark.parametrize(
    ("until", "metric", "newest", "reached"),
    [
        (5, "val_loss", 6, {"step": 6, "metric": 0.6}),  # where it was measured
        (6, "val_loss", 6, {"step": 6, "metric": 0.6}),
        (6, "loss", 6, {"step": 6, "metric": 1.0}),
        (5, "val_loss", 4, None),  # killed before the checkpoint
        (7, "val_loss", 6, None),
        (None, "loss", 6, None),
    ],
)  # fmt: skip
def test_where_a_trial_pauses(
    tmp_path: Path, until: int | None, metric: str, newest: int, reached: Any
) -> None:
    folder = RunFolder(made(tmp_path, 0, newest).folder)
    told(folder)
    pause = Pause(until, metric)
    assert pause.find(folder) is (reached is not None)
    assert pause.reached == reached


def test_a_trial_that_begins_stands_nowhere(tmp_path: Path) -> None:
    assert not Pause(1, "loss").find(RunFolder(tmp_path))
