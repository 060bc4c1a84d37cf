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
STARTING = "start workers"
"""What a run says whose record is written, and whose driver waits for Ray from then on."""


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
@pytest.mark.parametrize("name", list(WATCHED))
def test_a_run_without_its_ray_says_how_to_go_on(
    name: str, tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "lost")
    driver = runs.start(recipe)
    assert driver.stderr is not None
    said = []
    for line in driver.stderr:
        said.append(line)
        if STARTING in line:
            break
    parts = [c for c in psutil.Process(driver.pid).children() if c.name() == name]
    assert len(parts) == 1, "".join(said)
    parts[0].kill()
    _, rest = driver.communicate(timeout=120)
    assert driver.returncode == 75, "".join(said) + rest
    folder = tmp_path / "runs" / "lost"
    last = rest.splitlines()[-1]
    assert f"Ray was lost ({WATCHED[name]}); go on with: raytune-ft train --resume " in last
    assert "Traceback" not in rest
    assert RunFolder(folder).info()["status"] == "interrupted"
