"""A run kept on S3 is found, gone on with, refused or said to be finished, on another machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytune_ft import resume
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.new_run import new_folder, open_or_make
from raytune_ft.storing import fetching
from raytune_ft.storing.mirror import Mirror
from raytune_ft.storing.places import Place
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState

ELSEWHERE = {"host": "another-host", "pid": 7, "began": "boot 1"}


def recipe(bucket: str, **train: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}]}, "train": train,
        "run": {"name": "a1", "storage": f"{bucket}/runs"},
    })  # fmt: skip


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))


@pytest.fixture
def place(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where a run of another machine is kept, whose driver was lost behind step 3."""
    machine(monkeypatch, tmp_path / "lost")
    opened = open_or_make(recipe(bucket), "quickstart", None)
    assert opened is not None and not opened.goes_on
    run = opened.folder
    run.create("a1", loader.dump_yaml(recipe(bucket)), model_folder=str(tmp_path / "lost/m"))
    run.update(driver=ELSEWHERE)
    checkpoint.save(run.checkpoints, TrainState(step=3), {"w": torch.ones(2)}, {}, keep=2)
    place = Place(f"{bucket}/runs/a1")
    with Mirror(run, place, place.address, 2):
        pass
    machine(monkeypatch, tmp_path / "other")
    return place


def test_it_goes_on_from_its_newest_checkpoint(
    bucket: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_or_make(recipe(bucket), "quickstart", None)
    assert opened is not None and opened.goes_on
    assert opened.folder.path.is_relative_to(tmp_path / "other")
    newest = checkpoint.latest(opened.folder.checkpoints)
    assert newest is not None and newest.name == "step_000003"
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"{place.address}: goes on with this run, which began before"
    by_address = open_or_make(recipe(bucket), "quickstart", place.address)
    assert by_address is not None and by_address.folder.path == opened.folder.path
    assert resume.shown(opened.folder) == place.address


def test_another_recipe_is_refused(bucket: str, place: Place) -> None:
    message = rf"^run.name: {place.address} began with train.lr .*, this recipe has 0.5; train this"
    with pytest.raises(RecipeError, match=message):
        open_or_make(recipe(bucket, lr=0.5), "quickstart", None)


def test_a_finished_one_says_so(
    bucket: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads(place.read("run.json"))
    place.write("run.json", json.dumps({**info, "status": "done"}).encode())
    place.write("report.html", b"x")
    place.write("adapter/adapter_model.safetensors", b"x")
    assert open_or_make(recipe(bucket), "quickstart", None) is None
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"{place.address}: this run is finished")


def test_a_driver_that_lives_elsewhere_is_heard(
    bucket: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "LISTENS_S", 5.0)

    def beat(_seconds: float = 0) -> None:
        sign = {"driver": ELSEWHERE, "time": time.time()}
        place.write(liveness.ALIVE, json.dumps(sign).encode())

    beat()
    # not time.sleep itself, which other threads call too
    monkeypatch.setattr(resume, "time", SimpleNamespace(sleep=beat, monotonic=time.monotonic))
    with pytest.raises(CheckpointError, match="process 7 on another-host trains this run"):
        open_or_make(recipe(bucket), "quickstart", None)


def test_readers_get_no_checkpoint_and_a_model_of_theirs(
    bucket: str, place: Place, tmp_path: Path, tiny_model: Path
) -> None:
    run = fetching.run_folder(place.address)
    assert not run.checkpoints.exists()
    named = recipe(bucket)
    named = named.model_copy(
        update={"model": named.model.model_copy(update={"path": str(tiny_model)})}
    )
    place.write("recipe.yaml", loader.dump_yaml(named).encode())
    found = fetching.run_folder(place.address, with_model=True)
    assert found.info()["model_folder"] == str(tiny_model), "not the other machine's"


def test_what_is_not_there_is_one_line(bucket: str, place: Place) -> None:
    with pytest.raises(CheckpointError, match=rf"^{bucket}/runs/b2: no run is kept there"):
        fetching.run_folder(f"{bucket}/runs/b2")
    with pytest.raises(CheckpointError, match=r"^s3://nowhere-at-all/runs: no such bucket"):
        open_or_make(recipe("s3://nowhere-at-all"), "quickstart", None)
    with pytest.raises(RecipeError, match=rf"^run.name: '{bucket}/runs/a1' exists; go on with it"):
        new_folder(recipe(bucket), "quickstart")  # a sweep of that name
    assert RunFolder(fetching.copy_of(f"{bucket}/runs", "b2").path).run_json.exists() is False
