"""A sweep that is kept on S3: killed, its machine lost, it goes on elsewhere and finds the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from raytune_ft.storing import steps
from raytune_ft.storing.places import Place, local_copy
from raytune_ft.training.run_folder import RunFolder
from tests import runs, sweeps
from tests.cluster.test_storage import STORAGE, call, machine, server

__all__ = ["server"]  # a fixture

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(3000)]

TRIALS = 4
TUNE = """
  space:
    train.lr: {low: 1.0e-3, high: 3.0e-2, log: 1}
    lora.r: [2, 4, 8]
  trials: 4
  concurrent: 1
"""
BEST = "best/adapter_model.safetensors"


def over_in(ledger: bytes) -> set[int]:
    lines = [json.loads(line) for line in ledger.splitlines()]
    return {line["trial"] for line in lines if line["event"] in sweeps.ENDS}


def test_a_lost_machines_sweep_goes_on_elsewhere(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = sweeps.write_recipe(tmp_path, tiny_model, chats, "calm", TUNE)
    sweeps.run("--config", calm, *sweeps.SHORT)
    expected = tmp_path / "runs/calm"

    recipe = sweeps.write_recipe(tmp_path, tiny_model, chats, "lost", TUNE)
    command = ("--config", recipe, *sweeps.SHORT, f"run.storage={STORAGE}")
    place = Place(STORAGE) / "lost"
    lost = machine(monkeypatch, tmp_path / "machine_lost")
    process = sweeps.begin(*command)

    def is_in_the_middle() -> bool:
        """One trial is over there, and a later one has a checkpoint there."""
        names = place.names()
        over = over_in(place.read(steps.LEDGER)) if steps.LEDGER in names else set()
        saved = {int(n.split("/")[1][-4:]) for n in names if n.endswith("manifest.json")}
        return bool(over) and bool(saved - over)

    sweeps.until(process, is_in_the_middle)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(lost, ignore_errors=True)
    there = place.read(steps.LEDGER)
    over = over_in(there)
    assert 0 < len(over) < TRIALS

    last = machine(monkeypatch, tmp_path / "machine_last")
    printed = sweeps.run(*command)
    assert f"{STORAGE}/lost: goes on with this sweep, which began before" in printed
    sweep = local_copy(STORAGE, "lost")
    assert sweep.is_relative_to(last)
    assert sweeps.ends_of(sweep) == sweeps.ends_of(expected)
    begun = sweeps.begins_of(sweep)
    assert sorted(set(begun)) == list(range(TRIALS))
    assert not over & {n for n in begun if begun.count(n) > 1}, "what was over did not run again"
    ledger = place.read(steps.LEDGER)
    assert ledger == (sweep / steps.LEDGER).read_bytes() and ledger.startswith(there)
    best = RunFolder(sweep).info()["best"]
    assert best == RunFolder(expected).info()["best"]
    for name in (BEST, f"trials/trial_{best:04d}/adapter/adapter_model.safetensors"):
        assert place.read(name) == (expected / name).read_bytes(), name
    assert json.loads(place.read("run.json"))["status"] == "done"

    machine(monkeypatch, tmp_path / "machine_of_a_reader")
    assert f"{STORAGE}/lost: this sweep is finished" in sweeps.run(*command)
    _read_there(tmp_path, expected, best)


def _read_there(tmp_path: Path, expected: Path, best: int) -> None:
    """The verbs take the address of a sweep and of its trials."""
    listed = call("runs", STORAGE, "--json")
    assert [(e["name"], e["status"]) for e in json.loads(listed.stdout)] == [("lost", "done")]
    address, out = f"{STORAGE}/lost/trials/trial_{best:04d}", tmp_path / "out"
    exported = call("export", address, "--out", str(out))
    assert exported.returncode == 0, exported.stderr
    adapter = "adapter_model.safetensors"
    assert runs.sha256(out / adapter) == runs.sha256(expected / f"best/{adapter}")
    planned = call("train", "--config", f"{STORAGE}/lost/best.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    shutil.rmtree(tmp_path / "machine_of_a_reader")
    reported = call("report", f"{STORAGE}/lost")
    assert reported.returncode == 0, reported.stderr
    copy = local_copy(STORAGE, "lost")
    assert (copy / "sweep.html").is_file()
    assert not list(copy.glob("trials/*/adapter")), "a page needs none"
