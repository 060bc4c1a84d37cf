"""`raytune-ft stop`: drivers that are real processes, here and as if on another machine."""

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

from raytune_ft.lookout import stop as stage
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.run_folder import RunFolder, write_json
from tests.cli.conftest import Command
from tests.training.made_runs import make_run

DRIVER = """
import signal, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from raytune_ft.errors import Interrupted
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.wish import Wish
attending.LOOK_S = 0.1
if "elsewhere" in sys.argv:
    liveness.socket.gethostname = lambda: "another-host"
folder = RunFolder(sys.argv[1])
folder.update(driver=liveness.this_process())
with attending.attended(folder):
    print("here", flush=True)
    if "deaf" in sys.argv:
        time.sleep(0.5)
    with Wish() as wish:
        while wish.signal is None or "slow" in sys.argv:
            time.sleep(0.01)
    if folder.run_json.is_file():
        folder.update(status="stopped")
    raise Interrupted("stopped after step 4")
"""
"""A driver that stops as `fitting.see_through` does, by the same Wish."""


@contextmanager
def driven(place: Path, *how: str) -> Iterator[subprocess.Popen[str]]:
    make_run(place, steps=4, total=60, status="running")
    command = [sys.executable, "-c", DRIVER, str(place), *how]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            until = time.monotonic() + 30  # what a test writes is not written over by it then
            while not (place / liveness.ALIVE).is_file() and time.monotonic() < until:
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "HERE_S", 0.05)


WAYS = {
    "by signal": ((), "was asked to stop behind its step's checkpoint"),
    "by request, elsewhere": (("elsewhere",), "on another-host is asked to stop behind"),
    "by request, while it ignores Ctrl-C": (("deaf",), "is asked to stop behind"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stops_and_it_is_said_how_it_goes_on(tmp_path: Path, call: Command, way: str) -> None:
    how, asked = WAYS[way]
    place = tmp_path / "runs/a"
    with driven(place, *how) as process:
        said = call("stop", str(place))
        assert process.wait(timeout=60) == 1, "as an Interrupted that nobody catches"
    asking, ended = said.err.splitlines()
    assert said.code == 0 and said.out == "" and asked in asking
    assert ended == f"{place}: stopped; go on with: raytune-ft train --resume {place}"
    assert not (place / attending.REQUEST).exists()
    again = call("stop", str(place))
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert again.err.startswith(f"{place}: nothing to stop: stopped; go on with")


def test_a_run_that_is_only_starting_leaves_nothing(tmp_path: Path, call: Command) -> None:
    place = tmp_path / "runs/a"
    with driven(place) as process:
        for path in place.iterdir():
            if path.name != liveness.ALIVE:
                path.unlink()
        said = call("stop", str(place))
        assert process.wait(timeout=60) == 1
    assert said.code == 0
    assert said.err.splitlines()[-1] == f"{place}: it had not begun, and nothing is left of it"


@pytest.mark.parametrize("how", [(), ("elsewhere",)])
def test_at_once_needs_no_checkpoint(tmp_path: Path, call: Command, how: tuple[str, ...]) -> None:
    place = tmp_path / "runs/a"
    with driven(place, "slow", *how) as process:
        said = call("stop", "--now", str(place))
        assert process.wait(timeout=60) != 0
    assert said.code == 0 and "at once" in said.err
    assert said.err.splitlines()[-1].startswith(f"{place}: interrupted, its driver is gone; go on")


def test_waiting_ends_and_the_request_stands(tmp_path: Path, call: Command) -> None:
    place = tmp_path / "runs/a"
    with driven(place, "slow") as process:
        said = call("stop", "--wait", "0.2", str(place))
        assert said.code == 75 and "still goes on" in said.err.splitlines()[-1]
        assert process.poll() is None


def test_a_driver_that_is_gone(tmp_path: Path, call: Command) -> None:
    place = tmp_path / "runs/a"
    with driven(place) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = call("stop", str(place))
    assert said.code == 1
    assert said.err == (
        f"{place}: nothing to stop: interrupted, its driver is gone; "
        f"go on with: raytune-ft train --resume {place}\n"
    )


def test_a_number_that_went_to_another_process_is_sent_nothing(
    tmp_path: Path, call: Command
) -> None:
    place = tmp_path / "runs/a"
    with driven(place) as process:
        info = json.loads((place / "run.json").read_text())
        former = {**info["driver"], "began": "an earlier boot 17"}
        RunFolder(place).update(driver=former)
        write_json(place / liveness.ALIVE, {"driver": former, "time": time.time()})
        said = call("stop", "--now", str(place))
        assert said.code == 1 and "its driver is gone" in said.err
        assert process.poll() is None


def test_a_driver_that_has_not_written_its_record_yet_is_stopped(
    tmp_path: Path, call: Command
) -> None:
    """A run that is taken up again: its record is the last driver's for seconds."""
    place = tmp_path / "runs/a"
    with driven(place) as process:
        RunFolder(place).update(status="stopped", driver={**liveness.this_process(), "pid": 2**22})
        said = call("stop", str(place))
        assert process.wait(timeout=60) == 1
    assert said.code == 0 and f"process {process.pid} was asked to stop" in said.err


def test_a_sweep_goes_on_by_its_own_verb(tmp_path: Path, call: Command) -> None:
    sweep = make_run(tmp_path / "sweep", steps=0, status="stopped")
    (sweep.path / "trials.jsonl").write_text("")
    assert call("stop", str(sweep.path)).err.endswith(f"raytune-ft tune --resume {sweep.path}\n")


OTHERS = {
    "done": ({"status": "done"}, 1, "nothing to stop: it is done"),
    "damaged": ({"status": 3}, 1, "nothing to stop: damaged"),
    "of an unknown driver": ({"status": "running", "driver": None}, 2, "end that by hand"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_cannot_be_stopped_is_one_line(tmp_path: Path, call: Command, what: str) -> None:
    info, code, words = OTHERS[what]
    run = make_run(tmp_path / "a", steps=2)
    run.update(**info)
    said = call("stop", str(run.path))
    assert (said.code, said.err.count("\n")) == (code, 1) and words in said.err


def test_a_trial_is_stopped_with_its_sweep(tmp_path: Path, call: Command) -> None:
    trial = make_run(tmp_path / "sweep/trials/trial_0001", steps=2, status="running")
    said = call("stop", str(trial.path))
    assert said.code == 2
    assert said.err.endswith(f"is stopped with its sweep: raytune-ft stop {tmp_path / 'sweep'}\n")
    assert call("stop", str(tmp_path / "nothing")).code == 2
