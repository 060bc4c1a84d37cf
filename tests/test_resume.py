"""What `--resume RUN` goes on with, what it leaves, and what is said when Ray is lost."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from raytune_ft import resume
from raytune_ft.config import loader
from raytune_ft.config.schema import CheckpointSection, Recipe
from raytune_ft.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    RecipeError,
    TrainingError,
)
from raytune_ft.new_run import new_folder, open_or_make
from raytune_ft.resume import open_run, resumable
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import STARTING, RunFolder, write_json
from raytune_ft.training.saving import identity

GONE = {**liveness.this_process(), "began": "an earlier boot 1"}


def recipe(**changes: Any) -> Recipe:
    content = {"model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}]}, **changes}
    return Recipe.model_validate(content)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose driver was killed."""
    folder = RunFolder(tmp_path / "a1")
    folder.create("a1", loader.dump_yaml(recipe()))
    folder.update(driver=GONE)
    return folder


def test_a_killed_run_goes_on(run: RunFolder) -> None:
    opened = open_run(str(run.path), recipe())
    assert opened is not None and opened.path == run.path


def test_a_finished_run_says_so_in_one_line(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.update(status="done")
    assert open_run(str(run.path), recipe()) is not None, "no result: it is written again"
    run.adapter.mkdir()
    assert open_run(str(run.path), recipe()) is not None, "no report: it is written again"
    (run.path / "report.html").write_text("")
    assert open_run(str(run.path), recipe()) is None
    said = capsys.readouterr().err
    assert said.startswith(f"{run.path}: this run is finished, its result is {run.adapter}; ")
    assert said.endswith(f"begin another one with model.load_from={run.path}\n")
    assert len(said.splitlines()) == 1
    other = recipe(eval={"every": 3})
    assert open_run(str(run.path), other) is not None, "it may end elsewhere, or export another"


def test_a_run_at_work_is_left_alone(run: RunFolder) -> None:
    run.update(driver=liveness.this_process())
    message = rf"^{run.path}: process {os.getpid()} trains this run; wait until it ends"
    with pytest.raises(CheckpointError, match=message):
        open_run(str(run.path), recipe())


def test_a_lost_ray_is_told_with_how_to_go_on(run: RunFolder) -> None:
    with pytest.raises(Interrupted) as caught, resumable(run, "runs/a1"):
        raise ActorDiedError
    message = str(caught.value)
    assert message.startswith("runs/a1: Ray was lost (The actor died")
    assert message.endswith("; go on with: raytune-ft train --resume runs/a1")
    assert "\n" not in message
    assert run.status() == "interrupted"
    assert caught.value.exit_code == 75


def test_a_ray_lost_before_the_run_began_is_told_too(tmp_path: Path) -> None:
    message = "start the run again"
    with pytest.raises(TrainingError, match=message), resumable(RunFolder(tmp_path), "runs/a1"):
        raise ActorDiedError


def test_other_errors_stay_what_they_are(run: RunFolder) -> None:
    cause = DataError("a.jsonl:3: no row")
    theirs = RayTaskError("f", "traceback", cause).as_instanceof_cause()
    for error in (cause, theirs, KeyboardInterrupt()):
        with pytest.raises(type(error)), resumable(run, "runs/a1"):
            raise error
    assert run.status() == "interrupted", "its driver is gone, which nothing here changes"
    assert run.info()["status"] == "running"


def test_a_folder_in_which_a_run_never_began_is_taken_over(tmp_path: Path) -> None:
    named = recipe(run={"name": "a1", "storage": str(tmp_path)})
    first = new_folder(named, "quickstart")
    exists = f"run.name: '{first.path}' exists and is no run"
    with pytest.raises(RecipeError, match=exists):
        new_folder(named, "quickstart")
    with pytest.raises(RecipeError, match=exists):
        open_or_make(named, "quickstart", None)
    write_json(first.path / STARTING, GONE)
    (first.path / "run.log").write_text("Ray starts")
    assert new_folder(named, "quickstart").path == first.path
    write_json(first.path / STARTING, GONE)
    assert opened(named) == (first.path, False)
    first.create("a1", "")
    with pytest.raises(RecipeError, match=f"run.name: '{first.path}' exists; go on with it by"):
        new_folder(named, "quickstart")


def began(tmp_path: Path, **changes: Any) -> tuple[Recipe, RunFolder]:
    """Make a run whose driver was killed."""
    named = recipe(run={"name": "a1", "storage": str(tmp_path)}, **changes)
    made = open_or_make(named, "quickstart", None)
    assert made is not None and not made.goes_on
    made.folder.create("a1", loader.dump_yaml(named))
    made.folder.update(driver=GONE)
    return named, made.folder


def opened(named: Recipe) -> tuple[Path, bool]:
    run = open_or_make(named, "quickstart", None)
    assert run is not None
    return run.folder.path, run.goes_on


def test_a_run_that_is_submitted_again_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, folder = began(tmp_path)
    assert opened(named) == (folder.path, True)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].endswith("a1: goes on with this run, which began before")
    other = named.model_copy(update={"checkpoint": CheckpointSection(every=7)})
    assert open_or_make(other, "quickstart", None) is not None, "it decides no number"


def test_a_finished_run_that_is_submitted_again_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, folder = began(tmp_path)
    folder.update(status="done")
    folder.adapter.mkdir()
    (folder.path / "report.html").write_text("")
    assert open_or_make(named, "quickstart", None) is None
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "this run is finished, its result is" in told[0]


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path) -> None:
    named, folder = began(tmp_path)
    sections = {
        "train": named.train.model_copy(update={"lr": 3e-3}),
        "lora": named.lora.model_copy(update={"targets": ["q_proj"]}),
    }
    words = {
        "train": rf"a1 began with train.lr {named.train.lr}, this recipe has 0.003; train",
        "lora": r'a1 began with lora.targets all-linear, this recipe has \["q_proj"\]; train',
    }
    for section, changed in sections.items():
        other = named.model_copy(update={section: changed})
        with pytest.raises(RecipeError, match=rf"^run.name: .*{words[section]}"):
            open_or_make(other, "quickstart", None)
    larger = named.train.model_copy(update={"accumulation": named.train.accumulation + 1})
    with pytest.raises(CheckpointError, match="an optimizer step of this run is"):
        open_or_make(named.model_copy(update={"train": larger}), "quickstart", None)
    assert folder.run_json.is_file()


def test_a_run_that_is_trained_is_not_submitted_again(tmp_path: Path) -> None:
    named, folder = began(tmp_path)
    folder.update(driver=liveness.this_process())
    with pytest.raises(CheckpointError, match=rf"a1: process {os.getpid()} trains this run"):
        open_or_make(named, "quickstart", None)


ELSEWHERE = {"host": "another-host", "pid": 7, "began": "boot 1"}


def test_a_driver_on_another_machine_is_listened_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resume, "LISTENS_S", 0.3)
    monkeypatch.setattr(resume, "LOOK_S", 0.02)
    named, folder = began(tmp_path)
    folder.update(driver=ELSEWHERE)
    alive = folder.path / liveness.ALIVE
    write_json(alive, {"driver": ELSEWHERE, "time": time.time()})
    assert open_or_make(named, "quickstart", None) is not None, "it is silent"
    assert "listening for 0.3 s whether it does" in capsys.readouterr().err

    def beat(_seconds: float) -> None:
        write_json(alive, {"driver": ELSEWHERE, "time": time.time()})

    monkeypatch.setattr(resume.time, "sleep", beat)
    message = "a1: process 7 on another-host trains this run; wait until it ends, or end it by"
    with pytest.raises(CheckpointError, match=message):
        open_or_make(named, "quickstart", None)


def test_the_first_field_that_differs_is_found_in_lists_too() -> None:
    first, second = (
        recipe(data={"sources": [{"path": "a.jsonl"}, {"path": name}]})
        for name in ("b.jsonl", "c.jsonl")
    )
    assert identity.difference(first, first) is None
    assert identity.difference(first, second) == ("data.sources.1.path", "b.jsonl", "c.jsonl")
