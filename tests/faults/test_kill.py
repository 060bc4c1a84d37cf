"""kill -9 of the training worker at a random step: the run ends with the same final bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.training.run_folder import read_jsonl
from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def workers_of(pid: int) -> list[int]:
    """Find the Ray Train worker processes below a driver."""
    return [
        child.pid
        for child in psutil.Process(pid).children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]


def kill_at(recipe: Path, folder: Path, step: int) -> str:
    """Run a recipe, kill its worker when `step` stands in the metrics, wait for the end."""
    process = runs.start(recipe)
    killed = False
    deadline = time.monotonic() + 280
    while process.poll() is None and time.monotonic() < deadline:
        done = sum(1 for _ in read_jsonl(folder / "metrics.jsonl"))
        if not killed and done >= step:
            for pid in workers_of(process.pid):
                os.kill(pid, signal.SIGKILL)
                killed = True
        time.sleep(0.02)
    assert process.stderr is not None
    printed = process.stderr.read()
    assert process.wait(timeout=10) == 0, printed
    assert killed, f"no worker was found to kill\n{printed}"
    return printed


def test_killed_driver_is_resumed(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    """The driver dies, and with it its Ray; `--resume` ends with the undisturbed run's bytes."""
    whole = runs.write_recipe(tmp_path, tiny_model, chats, "whole")
    runs.train(whole)
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "killed")
    folder = tmp_path / "runs/killed"
    process = runs.start(recipe)
    while process.poll() is None and len(list(read_jsonl(folder / "metrics.jsonl"))) < 5:
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=10)
    command = [sys.executable, "-m", "raytune_ft.train", "--resume", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step" in done.stderr
    steps = [e["step"] for e in read_jsonl(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    weights = "adapter/adapter_model.safetensors"
    assert runs.sha256(folder / weights) == runs.sha256(tmp_path / "runs/whole" / weights)


def test_killed_worker_changes_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Dropout on, packing on, three epochs; the ledger of rows and the adapter must be equal."""
    whole = runs.write_recipe(tmp_path, tiny_model, chats, "whole")
    runs.train(whole)
    expected = list(read_jsonl(tmp_path / "runs/whole/metrics.jsonl"))
    assert len(expected) > 8
    for trial in range(request.config.getoption("--faults")):
        seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 2**32)) + trial
        step = random.Random(seed).randrange(1, len(expected) - 2)
        print(f"FAULT_SEED={seed}: killing at step {step}")
        name = f"killed_{trial}"
        recipe = runs.write_recipe(tmp_path, tiny_model, chats, name)
        folder = tmp_path / "runs" / name
        printed = kill_at(recipe, folder, step)
        assert "a worker was lost" in printed
        lines = list(read_jsonl(folder / "metrics.jsonl"))
        assert [e["step"] for e in lines] == [e["step"] for e in expected]
        assert [e["rows"] for e in lines] == [e["rows"] for e in expected]
        assert [e["loss"] for e in lines] == [e["loss"] for e in expected]
        weights = "adapter/adapter_model.safetensors"
        assert runs.sha256(folder / weights) == runs.sha256(tmp_path / "runs/whole" / weights)
