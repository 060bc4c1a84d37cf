"""`raytune-ft stop` of real runs: here, from another host, and through an object store.

Each goes on afterwards to the bytes of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raytune_ft.storing.places import Place
from raytune_ft.training.guarding import attending
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests import runs
from tests.faults.test_sigterm import steps_of, wait_for
from tests.storing.conftest import bucket, server  # noqa: F401, fixtures

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(3000)]

DEADLINE_S = 600
EPOCHS = "train.epochs=2"
WEIGHTS = "adapter/adapter_model.safetensors"
ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname somewhere-else; exec "$0" "$@"']
"""Runs a command on a host of another name, which can look no process up."""


def verb(*words: str, elsewhere: bool = False) -> subprocess.CompletedProcess[str]:
    command = [*(ELSEWHERE if elsewhere else ()), sys.executable, "-m", "raytune_ft", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, and what `logs -f` says of it meanwhile."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = runs.write_recipe(folder, tiny_model, chats, "whole")
    said: list[subprocess.CompletedProcess[str]] = []
    follower = threading.Thread(
        target=lambda: said.append(verb("logs", "-f", str(folder / "runs/whole"))), daemon=True
    )
    follower.start()
    process = runs.start(recipe, EPOCHS)
    printed = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, printed
    follower.join(timeout=DEADLINE_S)
    (folder / "followed").write_text(said[0].stdout)
    (folder / "printed").write_text(printed)
    assert said[0].returncode == 0, said[0].stderr
    return folder / "runs/whole"


def test_who_follows_a_run_reads_what_who_started_it_reads(whole: Path) -> None:
    """Widths of tables apart; the first line says when its driver began."""
    followed = (whole.parent.parent / "followed").read_text().splitlines()
    printed = (whole.parent.parent / "printed").read_text().splitlines()
    assert followed[0].startswith("--- 20")
    lines = [line for line in printed if line.startswith(("step ", "[", "plan "))]
    assert len(lines) > 10
    assert [line for line in followed if line.startswith(("step ", "[", "plan "))] == lines
    assert followed[-1].startswith("╰") and "report" in "".join(followed[-12:])


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="a host name takes root and unshare"
)
def test_a_run_that_was_stopped_twice_goes_on_to_the_same_bytes(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path
) -> None:
    """By signal from here, then by a request from a host that can look no process up."""
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    folder = tmp_path / "runs/run"
    process = runs.start(recipe, EPOCHS, "checkpoint.every=100")
    for elsewhere in (False, True):
        wait_for(process, folder, steps_of(folder) + 3)
        said = verb("stop", str(folder), elsewhere=elsewhere)
        assert said.returncode == 0, said.stderr
        asked, ended = said.stderr.splitlines()
        assert (" on " in asked) == elsewhere and "to stop behind its step's checkpoint" in asked
        assert ended == f"{folder}: stopped; go on with: raytune-ft train --resume {folder}"
        printed = process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 75, printed
        assert steps_of(folder) < steps_of(whole)
        assert not (folder / attending.REQUEST).exists()
        followed = verb("logs", "-f", "-n", "1", str(folder))
        assert followed.returncode == 75 and "stopped after step" in followed.stdout
        process = again(str(folder))
    check_same(process, folder, whole)


def again(run: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raytune_ft.train", "--resume", run]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def check_same(process: subprocess.Popen[str], folder: Path, whole: Path) -> None:
    """See that a run that was taken up again stops no second time and gives the same bytes."""
    printed = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, printed
    lines, expected = (list(read_jsonl(run / "metrics.jsonl")) for run in (folder, whole))
    assert [(e["step"], e["rows"], e["loss"]) for e in lines] == [
        (e["step"], e["rows"], e["loss"]) for e in expected
    ]
    assert runs.sha256(folder / WEIGHTS) == runs.sha256(whole / WEIGHTS)
    assert RunFolder(folder).status() == "done"


def test_a_run_that_is_kept_elsewhere_is_stopped_there(
    tiny_model: Path, chats: Path, tmp_path: Path, whole: Path,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Seen, stopped and read from a host that has none of its files."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("a host name of its own takes root and unshare")
    from raytune_ft.storing.places import local_copy

    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    storage = f"{bucket}/runs"
    address, folder = f"{storage}/run", local_copy(storage, "run")
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "run")
    process = runs.start(recipe, EPOCHS, "checkpoint.every=100", f"run.storage={storage}")
    wait_for(process, folder, 3)
    said = verb("stop", address, elsewhere=True)
    printed = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 75, printed
    assert said.returncode == 0, said.stderr
    assert said.stderr.splitlines()[-1].endswith(f"raytune-ft train --resume {address}")
    listed = verb("runs", storage, elsewhere=True).stdout.splitlines()[1].split("\t")
    assert listed[:2] == ["run", "stopped (resumable)"]
    assert listed[4].partition("/")[0] == str(steps_of(folder))
    told = verb("logs", address, "-n", "2", elsewhere=True)
    assert "stopped after step" in told.stdout, told
    assert Place(address).stamp(attending.REQUEST) is None
    check_same(again(address), folder, whole)
