"""A sweep whose trials run on a host without the driver's disk: the trials of one machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raytune_ft.sweeping.trials import name_of
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving import checkpoint
from tests import runs, sweeps
from tests.cluster import trained
from tests.cluster.hosts import DISK, Cluster, hosts, missing

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
ENDS_IN_S = 1500.0
VALUES = {"train.lr": [2e-3, 5e-3], "lora.r": [2]}
OWN_ROWS = {"data.max_length": [64, 96]}


@pytest.fixture(autouse=True)
def able() -> None:
    if why := missing():
        pytest.skip(why)


def tune(
    cluster: Cluster, inputs: Path, name: str, space: dict[str, Any], *, alone: bool = False,
    **section: Any,
) -> Path:  # fmt: skip
    """Run a sweep from host 0, on whose disk alone are its inputs; return its folder there.

    Args:
        cluster: with disks.
        inputs: of `trained.make_inputs`.
        name: of the sweep.
        space: choices, all of which are tried.
        alone: whether the driver starts a Ray of its own.
        section: fields of the section `tune`.
    """
    disk = cluster.disk(0)
    if not (disk / "inputs").exists():
        shutil.copytree(inputs, disk / "inputs")
    content = trained.recipe_of(name, workers=1, train={"max_steps": 8})
    content["tune"] = {
        "space": space, "search": "grid", "scheduler": "none", "concurrent": 1, **section,
    }  # fmt: skip
    (disk / f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "raytune_ft.tune", "--config", f"{DISK}/{name}.yaml"]
    env = {} if alone else {"RAY_ADDRESS": cluster.address}
    done = cluster.run(0, words, env=env, seconds=ENDS_IN_S)
    while done.returncode and "Ray did not start" in done.stdout:  # on a busy machine
        done = cluster.run(0, words, env=env, seconds=ENDS_IN_S)
    assert done.returncode == 0, done.stdout[-3000:]
    return disk / "runs" / name


def check(sweep: Path, expected: Path, *, exact: bool = True) -> None:
    """See that trials trained on host 1 are at home, whole, and what they are on one host."""
    ends, wanted = sweeps.ends_of(sweep), sweeps.ends_of(expected)
    assert {n: end[:2] for n, end in ends.items()} == {n: end[:2] for n, end in wanted.items()}
    for number in wanted:
        trial, other = (each / f"trials/{name_of(number)}" for each in (sweep, expected))
        run = RunFolder(trial)
        assert run.info()["driver"]["host"] == "host1" and run.info()["status"] == "done"
        storage = yaml.safe_load(run.recipe.read_text())["run"]["storage"]
        assert storage == f"{DISK}/runs/{sweep.name}/trials", "the driver's, not the host's"
        assert checkpoint.latest(run.checkpoints) is not None
        assert not [p for p in trial.rglob(".*") if "half" in p.name or "writing" in p.name]
        for name, value in runs.adapter_of(trial).items():
            tolerance = 0.0 if exact else 1e-5
            same = runs.adapter_of(other)[name]
            torch.testing.assert_close(value, same, rtol=tolerance, atol=tolerance)
    assert (sweep / f"trials/{name_of(0)}/run.log").is_file(), (
        "of a group on one base its first one"
    )
    adapter = "best/adapter_config.json"
    assert (sweep / adapter).read_bytes() == (expected / adapter).read_bytes()


def test_trials_on_a_host_without_the_drivers_disk(tmp_path: Path, inputs: Path) -> None:
    with hosts(2, cpus=1.0, disks=tmp_path) as cluster:
        expected = tune(cluster, inputs, "alone", VALUES, alone=True)
        check(tune(cluster, inputs, "carried", VALUES), expected)
        check(tune(cluster, inputs, "based", VALUES, shared_base=True), expected, exact=False)
        left = cluster.run(1, ["find", "/tmp/home", "-path", "*carried*", "-name", "trial_*"])
        assert left.stdout == "", "nothing of a trial stays on its host"


def test_trials_with_rows_of_their_own(tmp_path: Path, inputs: Path) -> None:
    """They are prepared where the rows are."""
    with hosts(2, cpus=1.0, disks=tmp_path) as cluster:
        expected = tune(cluster, inputs, "alone", OWN_ROWS, alone=True)
        check(tune(cluster, inputs, "carried", OWN_ROWS), expected)
