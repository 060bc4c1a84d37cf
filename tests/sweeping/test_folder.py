"""Which folder a sweep begins in or goes on in, and one line where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.sweeping.folder import open_sweep
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import STARTING, RunFolder, write_json
from tests.sweeping.made import recipe_of

SPACE: dict[str, Any] = {"lora.r": [4, 8]}


def named(folder: Path, **more: Any) -> Recipe:
    return recipe_of(SPACE, run={"name": "s", "storage": str(folder)}, **more)


def begun(folder: Path) -> RunFolder:
    """Make a sweep that was asked to stop."""
    recipe = named(folder)
    opened = open_sweep(recipe, "s.yaml", None)
    assert opened is not None
    opened.create("s", loader.dump_yaml(recipe))
    opened.update(status="stopped")
    return opened


def gone() -> dict[str, Any]:
    """Describe a process that has ended."""
    show = "from raytune_ft.training.guarding import liveness as l; print(l.this_process())"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return {**liveness.this_process(), "pid": int(done.stdout.split("'pid': ")[1].split(",")[0])}


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    first = begun(tmp_path)
    for recipe in (named(tmp_path), named(tmp_path, tune={"concurrent": 3})):
        again = open_sweep(recipe, "s.yaml", None)
        assert again is not None
        assert again.path == first.path
    resumed = open_sweep(named(tmp_path), "s.yaml", str(first.path))
    assert resumed is not None


def test_another_recipe_is_refused_by_its_first_field(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(RecipeError, match=r"began with train\.lr 0\.0002, this recipe has 0\.1;"):
        open_sweep(named(tmp_path, train={"lr": 0.1}), "s.yaml", None)
    with pytest.raises(RecipeError, match=r"began with tune\.trials 4, this recipe has 5;"):
        open_sweep(named(tmp_path, tune={"trials": 5}), "s.yaml", None)


def test_a_finished_sweep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(tmp_path)
    (folder.path / "best.yaml").touch()
    folder.update(status="done")
    assert open_sweep(named(tmp_path), "s.yaml", None) is None
    assert "this sweep is finished; its best recipe is" in capsys.readouterr().err


def test_a_run_is_no_sweep(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").create("a", "")
    with pytest.raises(CheckpointError, match=r"is no sweep .* raytune-ft train --resume"):
        open_sweep(named(tmp_path), "s.yaml", str(tmp_path / "a"))


def test_a_sweep_that_is_worked_on_is_left_alone(tmp_path: Path) -> None:
    begun(tmp_path).update(status="running", driver=liveness.this_process())
    with pytest.raises(CheckpointError, match="wait until it ends, or end it"):
        open_sweep(named(tmp_path), "s.yaml", None)


def test_a_driver_killed_before_the_beginning_is_followed(tmp_path: Path) -> None:
    opened = open_sweep(named(tmp_path), "s.yaml", None)
    assert opened is not None
    with pytest.raises(RecipeError, match="exists"):
        open_sweep(named(tmp_path), "s.yaml", None)
    write_json(opened.path / STARTING, gone())
    assert open_sweep(named(tmp_path), "s.yaml", None) is not None
