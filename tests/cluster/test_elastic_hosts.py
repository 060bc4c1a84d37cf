"""Elastic: a lost host, the same steps with the workers that are left, all of them when it is back.

Each host has room for 2 of the 4 workers. The run is stopped when it has been through all of that,
and held against one that kept its workers, at the last checkpoint that both have.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raytune_ft.errors import Interrupted
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.saving import checkpoint
from tests.cluster import trained
from tests.cluster.hosts import hosts, missing
from tests.faults.verdict import COUNTED, ROUNDING

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
EVERY = 10
STEPS = 3
"""That are waited for with each number of workers."""
ALL = {
    "lora": {"dropout": 0.0},  # ranks draw their own
    "train": {"epochs": 200},
    "eval": {"every": 1000},
    "checkpoint": {"every": EVERY, "keep": -1},
}


def ranks(run: RunFolder) -> list[int]:
    """Return how many workers took each step of the ledger."""
    if not run.metrics.is_file():
        return []
    return [len(step["rank_seconds"]) for step in read_jsonl(run.metrics)]


def last_common(runs: list[RunFolder]) -> int:
    """Return the last step of which all runs have a checkpoint."""
    steps = [{checkpoint.step_of(f) for f in checkpoint.step_folders(r.checkpoints)} for r in runs]
    return max(step for step in set.intersection(*steps) if step % EVERY == 0)


def test_a_lost_host_and_its_return(tmp_path: Path, inputs: Path) -> None:
    """Ledger to the field; losses and weights within float32's rounding, ROUNDING by norm."""
    if why := missing():
        pytest.skip(why)
    with hosts(3, cpus=1.0, disks=tmp_path) as cluster:
        driver = trained.begin(cluster, 0, inputs, "elastic", min_workers=1, **ALL)
        driver.until_step(EVERY + 2)
        cluster.kill(2)
        fewer = driver.until(lambda: ranks(driver.run)[-STEPS:] == [2] * STEPS, "fewer workers")
        cluster.start(2, 1.0)
        back = driver.until(lambda: ranks(driver.run)[-STEPS:] == [4] * STEPS, "all workers again")
        driver.until_step(driver.step() + EVERY)
        assert driver.stop() == Interrupted.exit_code, driver.told()
        assert "2 of 4 workers: the same steps of 4 packs" in driver.printed()
        print(
            f"2 workers {fewer:.1f} s after the kill, 4 again {back:.1f} s after the host's start"
        )

        whole = trained.begin(cluster, 0, inputs, "whole", **ALL)
        whole.until_step(driver.step() + EVERY)
        whole.stop()
    step = last_common([driver.run, whole.run])
    assert set(ranks(driver.run)[:step]) == {2, 4} and set(ranks(whole.run)) == {4}
    found, wanted = (list(read_jsonl(d.run.metrics))[:step] for d in (driver, whole))
    assert [[e[key] for key in COUNTED] for e in found] == [
        [e[key] for key in COUNTED] for e in wanted
    ]
    assert all(
        math.isclose(a["loss"], b["loss"], rel_tol=ROUNDING)
        for a, b in zip(found, wanted, strict=True)
    )
    ours, theirs = (
        load_file(d.run.checkpoints / checkpoint.folder_name(step) / checkpoint.WEIGHTS)
        for d in (driver, whole)
    )
    far = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
    print(f"weights of step {step} differ by {far:.1e}")
    assert ours.keys() == theirs.keys() and far < ROUNDING
