"""A run whose Ray dies says so, and ends with the code of a run that can be gone on with."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raytune_ft.lost_ray import WATCHED, ending_with_ray
from raytune_ft.training.run_folder import RunFolder
from tests import runs

SOON_S = 30.0
BEGUN = "start workers"
"""What a run says whose record is written."""
LOADING = "load model"
"""What it says when its driver asks Ray for nothing any more."""


@pytest.fixture(params=list(WATCHED))
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child that has the name of a part of Ray, and sleeps."""
    program = tmp_path / request.param
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "600"])
    yield child
    child.kill()
    child.wait()


def test_the_first_death_is_told(process: subprocess.Popen[bytes]) -> None:
    told: list[str] = []
    heard = threading.Event()

    def end(what: str) -> None:
        told.append(what)
        heard.set()

    with ending_with_ray(end):
        assert not told
        process.kill()
        assert heard.wait(SOON_S)
    assert told == [WATCHED[Path(os.fsdecode(process.args[0])).name]]  # type: ignore[index]


def test_a_ray_that_is_shut_down_is_not_lost(process: subprocess.Popen[bytes]) -> None:
    told: list[str] = []
    before = threading.active_count()
    with ending_with_ray(told.append):
        watchers = [t for t in threading.enumerate() if t.name.startswith("lost-ray")]
        assert threading.active_count() == before + len(watchers) and watchers
    process.kill()
    for watcher in watchers:
        watcher.join(SOON_S)
        assert not watcher.is_alive()
    assert told == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_without_its_raylet_says_how_to_go_on(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    driver = runs.start(runs.write_recipe(tmp_path, tiny_model, chats, "lost"))
    said = read_until(LOADING, driver)
    parts = [c for c in psutil.Process(driver.pid).children() if c.name() == "raylet"]
    assert len(parts) == 1, said
    parts[0].kill()
    _, rest = driver.communicate(timeout=120)
    assert driver.returncode == 75, said + rest
    last = rest.splitlines()[-1]
    assert "Ray was lost (its raylet ended); go on with: raytune-ft train --resume " in last
    assert "driver was killed" not in rest
    assert "Traceback" not in rest
    assert RunFolder(tmp_path / "runs/lost").info()["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exact
def test_a_killed_driver_is_spoken_for(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    driver = runs.start(runs.write_recipe(tmp_path, tiny_model, chats, "lost"))
    read_until(BEGUN, driver)
    driver.kill()
    _, rest = driver.communicate(timeout=120)
    last = rest.splitlines()[-1]
    assert "its driver was killed, or Ray was lost; go on with: raytune-ft train --resume" in last


def read_until(word: str, driver: subprocess.Popen[str]) -> str:
    """Read what a driver says up to a line with a word."""
    assert driver.stderr is not None
    said = ""
    for line in driver.stderr:
        said += line
        if word in line:
            return said
    raise AssertionError(said)
