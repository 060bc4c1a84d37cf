"""Four workers on two hosts, rows on a third: the run is that of one machine, to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import trained
from tests.cluster.hosts import Cluster, hosts, missing
from tests.conftest import ROOT
from tests.faults.verdict import compare

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
WORKER, DATA_TASK = "ray::RayTrainWorker", "ray::MapBatches"


@pytest.fixture(autouse=True)
def able() -> None:
    if why := missing():
        pytest.skip(why)


def test_workers_on_two_hosts_equal_those_of_one(
    tmp_path: Path, inputs: Path, undisturbed: Path
) -> None:
    """Only the driver's host has rows, model and run, so data tasks run there; no worker does."""
    with hosts(3, cpus=1.0, disks=tmp_path) as cluster:
        driver = trained.begin(cluster, 0, inputs, "many")
        made_on: set[int] = set()

        def trains() -> bool:
            made_on.update(n for n in range(3) if cluster.processes(n, DATA_TASK))
            return driver.step() >= 3

        driver.until(trains, "step 3")
        assert [len(cluster.processes(n, WORKER)) for n in range(3)] == [0, 2, 2]
        assert driver.end() == 0, driver.told()
    assert made_on <= {0}
    verdict = compare(0, "many", driver.run.path, undisturbed, [])
    assert verdict.mismatches == [] and (verdict.repeated, verdict.missing) == (0, 0), verdict


def test_hosts_share_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """Neither files nor process numbers; a host comes back empty."""
    cluster = Cluster(shared=[tmp_path])
    try:
        for number in (0, 1):
            cluster.boot(number)
        cluster.run(0, ["sh", "-c", f"echo here >/tmp/own; echo all >{tmp_path}/all; hostname"])
        assert (tmp_path / "all").read_text() == "all\n"
        assert cluster.run(1, ["cat", "/tmp/own", "/etc/hostname_of_nobody"]).returncode
        assert cluster.run(1, ["touch", str(ROOT / "written")]).returncode
        assert cluster.run(1, ["hostname"]).stdout == "host1\n"
        cluster.kill(0)
        cluster.boot(0)
        assert cluster.run(0, ["cat", "/tmp/own"]).returncode
    finally:
        cluster.end()


def test_hosts_end_with_a_killed_test() -> None:
    """kill -9 of what holds them: within a moment none of their processes is left."""
    script = (
        "import time; from tests.cluster.hosts import Cluster\n"
        "cluster = Cluster(); print(cluster.boot(0).pid, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    pid = int(holder.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    ends = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < ends:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
