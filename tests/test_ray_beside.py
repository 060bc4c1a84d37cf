"""Ray that starts beside imports: whatever ends a run meanwhile, nothing is left running."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SOON_S = 120.0
GONE_S = 30.0
"""Ray's workers notice by themselves that their raylet is gone."""
MISTAKE = """
import sys
from raytune_ft.cluster import ray_beside
from raytune_ft.errors import RecipeError
with ray_beside() as start:
    if sys.argv[1] == "there":
        start.wait()
        import ray
        assert ray.cluster_resources()["CPU"] >= 1
    raise RecipeError("a mistake")
"""


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for Ray's session, which its processes have in their command lines."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield folder


def left_of(ray_folder: str) -> list[str]:
    """Return commands of Ray's processes that stay."""
    deadline = time.monotonic() + GONE_S
    while (found := _of(ray_folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _of(ray_folder: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(ray_folder in word for word in process.cmdline()):
                found.append(" ".join(process.cmdline())[:200])
    return found


@pytest.mark.parametrize("moment", ["starting", pytest.param("there", marks=pytest.mark.exact)])
def test_a_mistake_found_meanwhile_ends_ray(ray_folder: str, moment: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", MISTAKE, moment],
        capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    assert said.stderr.splitlines()[-1] == "raytune_ft.errors.RecipeError: a mistake"
    assert list(Path(ray_folder).iterdir()), "Ray was never begun"
    assert left_of(ray_folder) == []


@pytest.mark.exact
def test_a_killed_driver_takes_ray_along(ray_folder: str) -> None:
    code = "import os, signal\n" + MISTAKE.replace(
        'raise RecipeError("a mistake")', "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, "there"], timeout=SOON_S, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert left_of(ray_folder) == []


@pytest.mark.parametrize(
    "instant",
    [pytest.param(n, marks=[pytest.mark.exact] if n else []) for n in range(6)],
)
def test_ctrl_c_at_any_moment_of_a_start(
    tiny_model: Path, chats: Path, tmp_path: Path, ray_folder: str, instant: int
) -> None:
    driver = runs.start(runs.write_recipe(tmp_path, tiny_model, chats, "stopped"))
    assert driver.stderr is not None
    if instant:
        while not (tmp_path / "runs/stopped/run.log").exists():
            assert driver.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(instant).uniform(0.0, 12.0))
    else:
        assert any("start Ray" in line for line in driver.stderr)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=SOON_S)[1]
    assert driver.returncode in (75, 130), said
    assert "Traceback" not in said
    if driver.returncode == 130:
        assert said.splitlines()[-1] == "error: interrupted"
    assert left_of(ray_folder) == []


def test_a_bad_row_is_one_line_though_workers_start(
    tiny_model: Path, tmp_path: Path, ray_folder: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Q"}]}\n' * 3)
    driver = runs.start(runs.write_recipe(tmp_path, tiny_model, rows, "bad"))
    said = driver.communicate(timeout=SOON_S)[1]
    assert driver.returncode == 3, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {rows}")
    assert not (tmp_path / "runs").exists()
    assert left_of(ray_folder) == []
