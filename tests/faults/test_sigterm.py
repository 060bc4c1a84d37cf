"""SIGTERM, Ctrl-C and a worker that hangs, in real runs through Ray Train: nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raytune_ft.training.checkpoint import step_folders, step_of
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray]

GRACE_S = 30
"""What a spot machine gives."""
WEIGHTS = "adapter/adapter_model.safetensors"


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return a driver's training workers, by rank."""
    below = psutil.Process(driver.pid).children(recursive=True)
    titled = [p for p in below if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]
    return sorted(titled, key=lambda p: p.pid)


def begin(recipe: Path, folder: Path, step: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a run; return when `step` stands in its metrics."""
    process = runs.start(recipe, "checkpoint.every=100", *overrides)
    deadline = time.monotonic() + 200
    while steps_of(folder) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    return process


def steps_of(folder: Path) -> int:
    return sum(1 for _ in read_jsonl(folder / "metrics.jsonl"))


def resume(folder: Path) -> str:
    command = [sys.executable, "-m", "raytune_ft.train", "--resume", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


def check_stopped(process: subprocess.Popen[str], folder: Path, seconds: float) -> None:
    """A line that says how to go on, exit code 75, and a checkpoint of the last step."""
    begun = time.monotonic()
    _, printed = process.communicate(timeout=120)
    spent = time.monotonic() - begun
    assert process.returncode == 75, printed
    assert spent < seconds
    step = step_of(step_folders(folder / "checkpoints")[-1])
    assert step == steps_of(folder)
    line = f"stopped after step {step}; go on with raytune-ft train --resume "
    assert printed.splitlines()[-1].startswith(line), printed
    assert "Traceback" not in printed
    assert RunFolder(folder).info()["status"] == "stopped"
    print(f"stopped in {spent:.1f} s behind step {step}")


def a_signal_to_the_driver(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)


def a_signal_to_a_worker(process: subprocess.Popen[str]) -> None:
    workers_of(process)[0].send_signal(signal.SIGTERM)


@pytest.mark.parametrize("send", [a_signal_to_the_driver, a_signal_to_a_worker])
def test_sigterm_stops_behind_a_checkpoint_and_nothing_is_lost(
    send: Callable[[subprocess.Popen[str]], None],
    tiny_model: Path, chats: Path, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    folder = tmp_path / "runs/run"
    process = begin(recipe, folder, 3, "train.epochs=40")
    send(process)
    check_stopped(process, folder, GRACE_S)
