"""What a process may use: cores that it is bound to, a container's share of time and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft import host
from tests.conftest import ROOT


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    return tmp_path


def on_one_core(code: str) -> str:
    """Run code in a process that is bound to one core; return what it prints."""
    taskset = shutil.which("taskset")
    if taskset is None:
        pytest.skip("no taskset")
    one = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [taskset, "-c", one, sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_no_more_cores_than_a_process_is_bound_to(cgroup: Path) -> None:
    assert host.cores() == len(os.sched_getaffinity(0))
    assert on_one_core("from raytune_ft import host; print(host.cores())") == "1"


@pytest.mark.ray
def test_ray_counts_the_same_cores() -> None:
    code = (
        "import ray; from raytune_ft.cluster import ray_session\n"
        "with ray_session(): print(ray.cluster_resources()['CPU'])"
    )
    assert on_one_core(code) == "1.0"


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1),
     ("6400000 100000", 64), ("12800000 100000", 64), ("", 64), ("nonsense", 64)],
)  # fmt: skip
def test_a_container_s_share_of_time(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (cgroup / "cpu.max").write_text(f"{quota}\n")
    assert host.cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 64), ("300000", 3)])
def test_a_container_s_share_as_older_systems_say_it(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroup / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert host.cores() == cores


def test_the_container_s_limit_goes_before_the_machine_s(cgroup: Path) -> None:
    installed = host.memory()
    assert installed is not None and installed > 2**28
    (cgroup / "memory.max").write_text("max\n")
    assert host.memory() == installed
    (cgroup / "memory.max").write_text(f"{2**27}\n")
    assert host.memory() == 2**27
