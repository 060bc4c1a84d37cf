"""kill -9 at random instants: the run ends with the same final bytes, each row seen once.

A few here; `python -m tests.faults.run` kills as often as is wanted, and shows who and when.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.conftest import ROOT, write_chats
from tests.data.feeds import content, feed_of
from tests.faults.verdict import Kill, intervals

pytestmark = [pytest.mark.slow]
DATA_TASK = "ray::MapBatches"


def killed(folder: Path, *words: str) -> dict[str, list[dict[str, Any]]]:
    """Kill runs in a process of its own, which has computed nothing; return what came of each."""
    told = folder / "told.json"
    command = [sys.executable, "-m", "tests.faults.run", "--json", str(told), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(told.read_text())
    return found


def check(verdicts: list[dict[str, Any]], wanted: int) -> None:
    assert sum(len(verdict["kills"]) for verdict in verdicts) >= wanted
    for verdict in verdicts:
        assert verdict["mismatches"] == [], verdict
        assert (verdict["repeated"], verdict["missing"]) == (0, 0), verdict
        allowed = intervals([Kill(**kill) for kill in verdict["kills"]])
        pairs = zip(verdict["redone"], allowed, strict=True)
        assert all(redone <= most for redone, most in pairs), verdict


def test_kills_of_a_worker_change_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Without Ray: dropout on, packing on, three epochs, one process or two, saving every step.

    And runs that go on with two processes, one, two ...: the same rows, and weights that differ
    by float32's rounding.
    """
    wanted = request.config.getoption("--plain-faults")
    words = ("--plain", str(wanted), "--worlds", "2", "--ray", "0", "--jobs", "2")
    found = killed(tmp_path, *words)
    check(found["plain"], wanted)
    check(found["worlds"], 2)


@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_kills_under_ray_train_change_nothing(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two workers; the victim is one of them, the driver, the raylet, a data task or the feeder."""
    wanted = request.config.getoption("--ray-faults")
    words = ("--plain", "0", "--ray", str(wanted), "--ray-jobs", "1")
    check(killed(tmp_path, *words)["ray"], wanted)


def data_tasks() -> list[int]:
    """Find the data tasks below this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if DATA_TASK in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


@pytest.mark.ray
def test_killed_data_tasks_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """The stream alone, in this process: a data task dies three times while it works."""
    from raytune_ft.cluster import ray_session

    tokenizer = TextTokenizer.from_folder(tiny_model)
    feed = feed_of(write_chats(tmp_path / "a.jsonl", 24_000), tokenizer, window=4000)
    expected = [content(placed.pack) for placed in iter_packs(feed, epochs=1)]
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < 3 and not ended.wait(0.01):
            for pid in data_tasks()[:1]:
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
