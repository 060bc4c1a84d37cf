"""A driver's signs of life and the request to stop, with real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raytune_ft.errors import TrainingError
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.run_folder import RunFolder, write_json

DRIVER = """
import sys, time
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.run_folder import RunFolder
attending.LOOK_S = 0.2
folder = RunFolder(sys.argv[1])
folder.update(name="a", status="running", driver=liveness.this_process())
try:
    with attending.attended(folder):
        print("here", flush=True)
        time.sleep(120)
except KeyboardInterrupt:
    folder.update(status="stopped")
"""
DEAF = DRIVER.replace(
    "import sys, time", "import sys, time, signal\nsignal.signal(2, lambda *_: 0)"
)


@contextmanager
def driver_of(place: Path, program: str = DRIVER) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def wait_until(holds: object, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_driver_gives_signs_of_life_and_obeys_what_is_asked_of_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with driver_of(tmp_path) as process:
        wait_until(lambda: folder.alive() is not None)
        own = folder.info()["driver"]
        assert liveness.at_work(folder.alive()) == own
        attending.ask(attending.Here(folder), own, now=False)
        assert process.wait(timeout=60) == 0
    assert folder.status() == "stopped"
    assert liveness.at_work(folder.alive()) is None and folder.alive()["over"]
    assert not (tmp_path / attending.REQUEST).exists(), "nothing stops the run's next driver"


def test_what_was_asked_of_an_earlier_driver_stops_no_later_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    earlier = {**liveness.this_process(), "began": "an earlier boot 17"}
    attending.ask(attending.Here(folder), earlier, now=True)
    with driver_of(tmp_path) as process:
        wait_until(lambda: folder.alive() is not None)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)


def test_a_process_that_obeys_no_signal_is_killed_where_it_is_to_stop_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "KILL_S", 0.2)
    with driver_of(tmp_path, DEAF) as process:
        ended = type("Ended", (), {"wait": lambda _, s: process.poll() is not None})()
        attending.interrupt(RunFolder(tmp_path).info()["driver"], now=True, over=ended)
        assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_number_that_is_another_process_s_now_is_sent_nothing(tmp_path: Path) -> None:
    with driver_of(tmp_path) as process:
        former = {**RunFolder(tmp_path).info()["driver"], "began": "an earlier boot 17"}
        with pytest.raises(ProcessLookupError):
            liveness.send(former, signal.SIGKILL)
        assert process.poll() is None


def test_a_driver_elsewhere_is_told_by_its_signs_of_life(tmp_path: Path) -> None:
    driver = {"host": "another-host", "pid": 7, "began": "boot 1"}
    write_json(tmp_path / "run.json", {"status": "running", "driver": driver})
    ages = {liveness.SILENT_S - 60: "running", liveness.SILENT_S + 60: "interrupted"}
    for age, status in ages.items():
        write_json(tmp_path / liveness.ALIVE, {"driver": driver, "time": time.time() - age})
        assert RunFolder(tmp_path).status() == status
    over = {"driver": driver, "time": time.time(), "over": True}
    write_json(tmp_path / liveness.ALIVE, over)
    assert RunFolder(tmp_path).status() == "interrupted", "it said that it ended"
    write_json(tmp_path / liveness.ALIVE, {"driver": {**driver, "pid": 8}, "time": 0.0})
    assert RunFolder(tmp_path).status() == "running", "an earlier driver's sign tells nothing"
    (tmp_path / liveness.ALIVE).write_text("{")
    assert RunFolder(tmp_path).status() == "running"


def test_the_words_of_an_error_stay_with_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("a", "model: {path: m}\n")
    with pytest.raises(TrainingError), attending.end_kept(folder):
        raise TrainingError("step 3: the loss is nan")
    assert folder.info()["ended"] == {"words": "step 3: the loss is nan", "code": 5}
    assert folder.lines.read_text() == "error: step 3: the loss is nan\n"
    folder.create("a", "model: {path: m}\n")
    assert json.loads(folder.run_json.read_text())["ended"] is None


def test_nothing_is_left_of_a_run_that_never_began(tmp_path: Path) -> None:
    with attending.attended(RunFolder(tmp_path)):
        wait_until((tmp_path / attending.ALIVE).is_file)
    assert list(tmp_path.iterdir()) == []
