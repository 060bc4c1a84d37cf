"""`runs`, `logs` and `stop` of runs on a real S3 server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.lookout import logs, stop
from raytune_ft.lookout.elsewhere import TAIL_BYTES, list_elsewhere
from raytune_ft.storing.places import Place
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.watching.reporting.listing import list_runs
from tests.cli.conftest import Command
from tests.storing.conftest import bucket, server  # noqa: F401, fixtures
from tests.training.made_runs import make_run

ABROAD = {"host": "another-host", "pid": 7, "began": "boot 1"}
DRIVER = """
import sys, time
from raytune_ft.errors import Interrupted
from raytune_ft.storing.places import Place
from raytune_ft.training.guarding import attending, liveness
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.wish import Wish
attending.LOOK_S = 0.1
liveness.socket.gethostname = lambda: "another-host"
folder, place = RunFolder(sys.argv[1]), Place(sys.argv[2])
folder.update(status="running", driver=liveness.this_process())
place.send(folder.run_json, "run.json")
with attending.attended(folder, place), Wish() as wish:
    print("here", flush=True)
    while wish.signal is None:
        time.sleep(0.01)
    folder.update(status="stopped")
    place.send(folder.run_json, "run.json")
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (logs, stop):
        monkeypatch.setattr(module, "ELSEWHERE_S", 0.05)


def sign(place: Place, age_s: float, **more: Any) -> None:
    said = {"driver": ABROAD, "time": time.time() - age_s, **more}
    place.write(attending.ALIVE, json.dumps(said).encode())


@pytest.fixture
def storage(bucket: str, tmp_path: Path) -> Place:  # noqa: F811
    """Runs of several statuses, a damaged one, and what is no run."""
    runs, run = Place(bucket) / "runs", make_run(tmp_path / "done", steps=120, total=300)
    assert run.metrics.stat().st_size > TAIL_BYTES
    for number, status in enumerate(("done", "stopped", "running", "interrupted", "damaged")):
        said = "running" if status == "interrupted" else status
        created = f"2026-01-0{number + 1}T00:00:00+00:00"
        info = {**run.info(), "name": status, "status": said, "driver": ABROAD, "created": created}
        (runs / status).write("run.json", json.dumps(info).encode())
        (runs / status).send(run.metrics, "metrics.jsonl")
    (runs / "stopped").write("checkpoints/step_000120/weights.safetensors", b"many bytes")
    (runs / "interrupted").write("checkpoints/step_000100/weights.safetensors", b"many bytes")
    sign(runs / "running", liveness.SILENT_S - 60)
    sign(runs / "interrupted", liveness.SILENT_S + 60)
    (runs / "damaged").write("run.json", b'{"name": "dam')
    (runs / "notes").write("read.me", b"no run")
    return runs


def test_runs_elsewhere_are_told_as_those_here_are(storage: Place, tmp_path: Path) -> None:
    found = {entry.name: entry for entry in list_elsewhere(storage.address)}
    assert list(found) == ["interrupted", "running", "stopped", "done", "damaged"]
    assert {name: entry.status for name, entry in found.items()} == {name: name for name in found}
    assert [name for name, entry in found.items() if entry.resumable] == ["interrupted", "stopped"]
    assert found["damaged"].remark == "run.json is not readable" and found["damaged"].steps == 120
    (here,), there = list_runs(tmp_path / "done"), found["done"]
    for field in ("steps", "total", "loss", "val_loss", "model", "method", "remark"):
        assert getattr(there, field) == getattr(here, field), field
    assert there.path == f"{storage.address}/done" and 0 <= (there.seen or 0) < 600


def test_little_is_read_of_each(storage: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No whole file but the record, and nothing of checkpoints."""
    read: list[str] = []
    real = {name: getattr(Place, name) for name in ("read", "part")}
    for way, function in real.items():
        monkeypatch.setattr(
            Place,
            way,
            lambda self, name, *more, f=function: (read.append(name), f(self, name, *more))[1],
        )
    list_elsewhere(storage.address)
    assert set(read) == {"run.json", "metrics.jsonl", liveness.ALIVE}
    assert read.count("metrics.jsonl") == 5


def test_runs_of_an_address_are_printed(storage: Place, call: Command) -> None:
    said = call("runs", storage.address, "--status", "stopped")
    line = said.out.splitlines()[1].split("\t")
    assert said.code == 0 and line[:2] == ["stopped", "stopped (resumable)"]
    assert line[4] == "120/300"
    one = call("runs", f"{storage.address}/done")
    assert [row.partition("\t")[0] for row in one.out.splitlines()] == ["name", "done"]
    assert call("runs", f"{storage.address}/notes").code == 1
    nowhere = call("runs", "s3://no-such-bucket/runs")
    assert nowhere.code == 2 and nowhere.err.count("\n") == 1 and "no such bucket" in nowhere.err


def test_a_sweep_elsewhere_has_its_counts(storage: Place) -> None:
    ledger = [{"event": event, "trial": n} for n, event in enumerate(("done", "failed", "started"))]
    lines = "".join(f"{json.dumps(event)}\n" for event in ledger)
    (storage / "stopped").write("trials.jsonl", lines.encode())
    entry = next(one for one in list_elsewhere(storage.address) if one.name == "stopped")
    assert entry.trials == {"done": 1, "interrupted": 1, "failed": 1}


def test_lines_elsewhere_are_followed_as_the_file_is_replaced(
    storage: Place, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, printed = storage / "running", []
    monkeypatch.setattr(logs, "_say", printed.append)
    place.write("lines.log", b"one\ntwo\n")
    codes: list[int] = []
    words = ("logs", "-f", "-n", "1", place.address)
    thread = threading.Thread(target=lambda: codes.append(call(*words).code), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    for content in (b"one\ntwo\nthree\n", b"one\ntwo\nthree\nfour\n"):
        while len(printed) < content.count(b"\n") - 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        place.write("lines.log", content)
    place.write("run.json", json.dumps({"status": "done", "driver": ABROAD}).encode())
    sign(place, 0, over=True)
    thread.join(timeout=60)
    assert (codes, printed) == ([0], ["two", "three", "four"])


def test_a_driver_elsewhere_is_stopped_through_the_store(
    storage: Place, tmp_path: Path, call: Command
) -> None:
    place = storage / "driven"  # where no other driver has given a sign of life
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "done"), place.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            said = call("stop", place.address)
            assert process.wait(timeout=60) == 0, said
        finally:
            process.kill()
    assert said.code == 0 and "on another-host is asked to stop behind" in said.err
    assert said.err.splitlines()[-1] == (
        f"{place.address}: stopped; go on with: raytune-ft train --resume {place.address}"
    )
    assert place.stamp(attending.REQUEST) is None
    gone = call("stop", f"{storage.address}/interrupted")
    assert gone.code == 1 and "interrupted, its driver is gone; go on" in gone.err
