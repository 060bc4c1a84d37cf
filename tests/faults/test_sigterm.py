"""SIGTERM, Ctrl-C and a worker that hangs, in real runs through Ray Train: nothing is lost.

One run is for every day, the others are for `make faults`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.saving.checkpoint import step_folders, step_of
from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray]

DEADLINE_S = 600
"""For anything at all, on a machine that does much else."""
TWO = ("run.workers=2", "train.accumulation=1", "train.epochs=12")
WEIGHTS = "adapter/adapter_model.safetensors"


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return a driver's training workers; Ray writes what a process is into its command line."""
    below = psutil.Process(driver.pid).children(recursive=True)
    found = []
    for process in below:
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::RayTrainWorker"]:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def long(request: pytest.FixtureRequest) -> None:
    """Leave out what takes minutes, unless many faults are asked for."""
    if request.config.getoption("--faults") == 1:
        pytest.skip("part of `make faults`")


@pytest.fixture(scope="module")
def whole(
    long: None, tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An undisturbed run of two workers."""
    folder = tmp_path_factory.mktemp("whole")
    process = runs.start(runs.write_recipe(folder, tiny_model, chats, "whole"), *TWO)
    _, printed = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, printed
    return folder / "runs/whole"


def begin(recipe: Path, folder: Path, step: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a run that saves at its end alone; return when `step` stands in its metrics."""
    process = runs.start(recipe, "checkpoint.every=100", *overrides)
    wait_for(process, folder, step)
    return process


def begin_again(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raytune_ft.train", "--resume", str(folder), *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while steps_of(folder) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"step {step} has not come\n{process.communicate()[1]}")
        time.sleep(0.02)


def steps_of(folder: Path) -> int:
    return sum(1 for _ in read_jsonl(folder / "metrics.jsonl"))


def check_stopped(process: subprocess.Popen[str], folder: Path) -> None:
    """Look for a line that says how to go on, exit code 75 and a checkpoint of the last step.

    A driver that has waited for longer than a spot machine gives says something else.
    """
    begun = time.monotonic()
    _, printed = process.communicate(timeout=DEADLINE_S)
    spent = time.monotonic() - begun
    assert process.returncode == 75, printed
    step = step_of(step_folders(folder / "checkpoints")[-1])
    assert step == steps_of(folder)
    line = f"stopped after step {step}; go on with raytune-ft train --resume "
    assert printed.splitlines()[-1].startswith(line), printed
    assert "Traceback" not in printed
    assert RunFolder(folder).info()["status"] == "stopped"
    print(f"stopped in {spent:.1f} s behind step {step}")


def test_sigterm_stops_a_run_behind_its_checkpoint(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    process = begin(recipe, tmp_path / "runs/run", 3, "train.epochs=90")
    process.send_signal(signal.SIGTERM)
    check_stopped(process, tmp_path / "runs/run")


@pytest.mark.usefixtures("long")
def test_a_stopped_run_goes_on_and_a_hang_starts_it_again(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path
) -> None:
    """One run of two workers: a SIGTERM, then a rank that stands still, then the same bytes."""
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    folder = tmp_path / "runs/run"
    process = begin(recipe, folder, 3, *TWO)
    process.send_signal(signal.SIGTERM)
    check_stopped(process, folder)

    process = begin_again(folder, "checkpoint.every=1", "run.collective_timeout=8")
    wait_for(process, folder, steps_of(folder) + 2)
    stopped = workers_of(process)[-1]
    stopped.send_signal(signal.SIGSTOP)
    _, printed = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, printed
    assert re.search(r"a worker was lost \(step \d+: no worker went on for 8 s", printed), printed
    stacks = [(folder / f"stacks/rank_{rank}.txt").read_text() for rank in range(2)]
    assert sum("its process is T (stopped)" in stack for stack in stacks) == 1
    assert sum("distributed_c10d.py" in stack for stack in stacks) == 1, "the other one waits"
    lines, expected = (list(read_jsonl(run / "metrics.jsonl")) for run in (folder, whole))
    assert [(e["step"], e["rows"], e["loss"]) for e in lines] == [
        (e["step"], e["rows"], e["loss"]) for e in expected
    ]
    assert runs.sha256(folder / WEIGHTS) == runs.sha256(whole / WEIGHTS)


@pytest.mark.usefixtures("long")
def test_a_worker_s_sigterm_and_a_second_ctrl_c(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    """A drained node's worker stops the run; who asks twice is not kept waiting."""
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    folder = tmp_path / "runs/run"
    process = begin(recipe, folder, 3, "train.epochs=90")
    (worker,) = workers_of(process)
    worker.send_signal(signal.SIGTERM)
    check_stopped(process, folder)

    process = begin_again(folder)
    wait_for(process, folder, steps_of(folder) + 2)
    (worker,) = workers_of(process)
    worker.send_signal(signal.SIGSTOP)  # it would not stop for a first one
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert RunFolder(folder).status() in ("interrupted", "stopped")
