"""kill -9 of a run's processes at random steps: the run ends with the same final bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.training.run_folder import read_jsonl
from tests import runs
from tests.conftest import write_chats
from tests.data.feeds import content, feed_of

pytestmark = [pytest.mark.slow, pytest.mark.ray]


WORKER, FEEDER, DATA_TASK = "RayTrainWorker", "ray::Feeder", "ray::MapBatches"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train(runs.write_recipe(folder, tiny_model, chats, "whole"))
    return folder / "runs/whole"


def processes_of(pid: int, title: str) -> list[int]:
    """Find the Ray processes of a kind below a driver."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def kill_at(recipe: Path, folder: Path, step: int, title: str = WORKER) -> str:
    """Run a recipe, kill processes when `step` stands in the metrics, wait for the end."""
    process = runs.start(recipe)
    killed = False
    deadline = time.monotonic() + 280
    while process.poll() is None and time.monotonic() < deadline:
        done = sum(1 for _ in read_jsonl(folder / "metrics.jsonl"))
        if not killed and done >= step:
            for pid in processes_of(process.pid, title):
                os.kill(pid, signal.SIGKILL)
                killed = True
        time.sleep(0.02)
    assert process.stderr is not None
    printed = process.stderr.read()
    assert process.wait(timeout=10) == 0, printed
    assert killed, f"no {title} was found to kill\n{printed}"
    return printed


def test_killed_driver_is_resumed(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path
) -> None:
    """The driver dies, and with it its Ray; `--resume` ends with the undisturbed run's bytes."""
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
    assert runs.sha256(folder / WEIGHTS) == runs.sha256(whole / WEIGHTS)


def test_killed_worker_changes_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path, request: pytest.FixtureRequest
) -> None:
    """Dropout on, packing on, three epochs; the ledger of rows and the adapter must be equal."""
    expected = list(read_jsonl(whole / "metrics.jsonl"))
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
        assert runs.sha256(folder / WEIGHTS) == runs.sha256(whole / WEIGHTS)


def test_killed_feeder_changes_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path
) -> None:
    """It is started again without a worker noticing: no step is taken twice."""
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "killed")
    folder = tmp_path / "runs/killed"
    printed = kill_at(recipe, folder, 1, FEEDER)
    assert "a worker was lost" not in printed
    for name in ("rows", "loss"):
        lines, expected = (read_jsonl(run / "metrics.jsonl") for run in (folder, whole))
        assert [e[name] for e in lines] == [e[name] for e in expected]
    assert runs.sha256(folder / WEIGHTS) == runs.sha256(whole / WEIGHTS)


def test_killed_data_tasks_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """The stream alone, in this process: a data task dies three times while it works."""
    from raytune_ft.cluster import ray_session

    tokenizer = TextTokenizer.from_folder(tiny_model)
    feed = feed_of(write_chats(tmp_path / "a.jsonl", 24_000), tokenizer, window=4000)
    expected = [content(placed.pack) for placed in iter_packs(feed, epochs=1)]
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < 3 and not ended.wait(0.01):
            for pid in processes_of(os.getpid(), DATA_TASK)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    ended = threading.Event()
    killer = threading.Thread(target=kill)
    with ray_session():
        from raytune_ft.data.feeder import Rows, feeding

        with feeding({"train": Rows(feed)}) as supply:
            killer.start()
            got = [content(placed.pack) for placed in supply.packs("train")]
            ended.set()
            killer.join()
    assert got == expected
    assert killed
