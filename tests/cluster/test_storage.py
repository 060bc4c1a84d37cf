"""A run that is kept on S3: killed, its machine lost, it goes on elsewhere to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from raytune_ft.storing import fetching
from raytune_ft.storing.places import Place, local_copy
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests.conftest import write_chats
from tests.runs import sha256, start, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(3000)]

BUCKET = "runs-of-tests"
STORAGE = f"s3://{BUCKET}/runs"
RESULT = "adapter/adapter_model.safetensors"
AT_STEP = 6
"""Of about thirty, with a checkpoint every two."""
QUICK = "train.deepspeed=none"
"""Its import takes as long as all else."""
CLI = [sys.executable, "-m", "raytune_ft"]


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from pyarrow import fs

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-key-of-tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    ).create_dir(BUCKET)
    yield f"http://{host}:{port}"
    running.stop()


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Go over to another machine: nothing is kept on it yet."""
    folder.mkdir()
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    return folder


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *words], capture_output=True, text=True, env=dict(os.environ), check=False
    )


def train(recipe: Path, *overrides: str) -> str:
    """Run to the end; return what it printed for people."""
    return end(start(recipe, *overrides))


def end(process: subprocess.Popen[str]) -> str:
    _, printed = process.communicate(timeout=1200)
    assert process.returncode == 0, printed
    return printed


def step_there(place: Place) -> int:
    found = fetching.steps.steps_in(place.names("checkpoints"))
    return fetching.steps.last_whole(found)


def kill_behind(process: subprocess.Popen[str], place: Place, step: int) -> None:
    """Kill a driver as soon as a checkpoint of `step` or later is kept elsewhere."""
    deadline = time.monotonic() + 900
    while step_there(place) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_lost_machines_run_goes_on_elsewhere_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 40)
    undisturbed = write_recipe(tmp_path, tiny_model, data, "undisturbed")
    whole = start(undisturbed, QUICK)
    expected = RunFolder(tmp_path / "runs/undisturbed")

    recipe = write_recipe(tmp_path, tiny_model, data, "lost")
    here = [f"run.storage={STORAGE}", QUICK]
    place = Place(STORAGE) / "lost"
    machine(monkeypatch, tmp_path / "machine_lost")
    kill_behind(start(recipe, *here), place, AT_STEP)
    end(whole)
    last = machine(monkeypatch, tmp_path / "machine_last")
    printed = train(recipe, *here)
    assert f"{STORAGE}/lost: goes on with this run, which began before" in printed

    run = RunFolder(local_copy(STORAGE, "lost"))
    assert run.path.is_relative_to(last)
    assert sha256(run.path / RESULT) == sha256(expected.path / RESULT)
    assert place.read(RESULT) == (expected.path / RESULT).read_bytes()
    lines, wanted = (
        [(e["step"], e["loss"]) for e in read_jsonl(folder.metrics)] for folder in (run, expected)
    )
    assert lines == wanted, "each step stands there once, with the same loss"
    assert json.loads(place.read("run.json"))["status"] == "done"
    assert b"a-key-of-tests" not in b"".join(place.read(name) for name in place.names())
    steps = fetching.steps.steps_in(place.names("checkpoints"))
    assert list(steps.values()) == [True, True], "checkpoint.keep is 2"

    machine(monkeypatch, tmp_path / "machine_of_a_reader")
    finished = train(recipe, *here)
    assert finished.count("\n") <= 2 and "this run is finished" in finished
    _read_there(tmp_path)


def _read_there(tmp_path: Path) -> None:
    """The verbs take the address of a run, on a machine that has never seen it."""
    address = f"{STORAGE}/lost"
    for words in (["export", address, "--out", str(tmp_path / "out")], ["report", address]):
        done = call(*words)
        assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "out/adapter_model.safetensors")
    wrong = call("chat", f"{STORAGE}/none", "--ask", "x")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"error: {STORAGE}/none: no run is kept there")
    assert wrong.stderr.count("\n") == 1
