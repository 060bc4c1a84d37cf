"""What `--resume RUN` goes on with, what it leaves, and what is said when Ray is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, DataError, Interrupted, TrainingError
from raytune_ft.new_run import new_folder
from raytune_ft.resume import open_run, resumable
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import STARTING, RunFolder, write_json

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
    exists = f"run.name: '{first.path}' exists"
    with pytest.raises(Exception, match=exists):
        new_folder(named, "quickstart")
    write_json(first.path / STARTING, GONE)
    (first.path / "run.log").write_text("Ray starts")
    assert new_folder(named, "quickstart").path == first.path
    first.create("a1", "")
    with pytest.raises(Exception, match=exists):
        new_folder(named, "quickstart")
