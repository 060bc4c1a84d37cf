"""A sweep on one base by the command line: the trials of the same sweep in processes of their own.

Stopped in the middle and taken up it ends in the same way.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from raytune_ft.training.run_folder import RunFolder
from tests import runs, sweeps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2400)]

TRIALS = 4
TUNE = """
  space:
    train.lr: {low: 1.0e-3, high: 3.0e-2, log: 1}
    lora.r: [2, 4, 8]
  trials: 4
"""


@pytest.fixture(scope="module")
def folder(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes `alone` and `shared` are, and their finished sweeps under `runs`."""
    folder = tmp_path_factory.mktemp("shared_base")
    for name, words in (("alone", ()), ("shared", ("tune.shared_base=true",))):
        recipe = sweeps.write_recipe(folder, tiny_model, chats, name, TUNE)
        sweeps.run("--config", recipe, *sweeps.SHORT, *words)
    return folder / "runs"


def check_same(sweep: Path, expected: Path) -> None:
    """See that two sweeps tried the same and found the same."""
    ends, wanted = sweeps.ends_of(sweep), sweeps.ends_of(expected)
    assert sorted(ends) == sorted(wanted) == list(range(TRIALS)), "each ended once"
    assert {end[0] for end in wanted.values()} == {"done", "stopped"}
    for number, (event, step, metric) in wanted.items():
        assert ends[number][:2] == (event, step)
        assert ends[number][2] == pytest.approx(metric, abs=1e-5)
        trials = [each / f"trials/trial_{number:04d}" for each in (sweep, expected)]
        assert all(RunFolder(trial).info()["driver"] for trial in trials), "a run folder of its own"
        if event == "done":
            own, other = map(runs.adapter_of, trials)
            assert own.keys() == other.keys()
            for name, value in own.items():
                torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5)


def test_trials_are_those_of_processes_of_their_own(folder: Path) -> None:
    check_same(folder / "shared", folder / "alone")
    assert sweeps.begins_of(folder / "shared") == list(range(TRIALS)), "one group"


def test_a_stopped_one_goes_on_to_the_same(
    folder: Path, tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = sweeps.write_recipe(tmp_path, tiny_model, chats, "stopped", TUNE)
    sweep = tmp_path / "runs/stopped"
    process = sweeps.begin("--config", recipe, *sweeps.SHORT, "tune.shared_base=true")
    sweeps.until(process, lambda: sweeps.steps_of(sweep / "trials/trial_0000") >= 3)
    process.send_signal(signal.SIGTERM)
    code, printed = sweeps.ended(process)
    assert code == 75, printed
    assert len(sweeps.ends_of(sweep)) < TRIALS, "it was in the middle"
    sweeps.run("--resume", sweep)
    check_same(sweep, folder / "shared")
    best = "best/adapter_model.safetensors"
    assert runs.sha256(sweep / best) == runs.sha256(folder / "shared" / best)
