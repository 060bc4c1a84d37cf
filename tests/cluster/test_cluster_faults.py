"""Faults of a cluster: a lost raylet, a pulled cable, a lost head; the run ends as undisturbed.

Hosts 1 and 2 have room for all 4 workers each, so that a run can go on without either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_ft.training.run_folder import RunFolder
from tests.cluster import trained
from tests.cluster.hosts import Cluster, hosts, missing
from tests.faults.verdict import compare

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
AT_STEP = 12
"""Of the fault: behind two checkpoints, long before the end."""
CUT_S = 20.0
ROOM = 2.0
"""CPUs of a host; a worker asks for half a one."""


def struck(driver: trained.Driver, strike: Callable[[], object]) -> tuple[int, float]:
    """Strike behind step AT_STEP, see the run to its end; as `trained.Driver.follow` returns it."""
    driver.until_step(AT_STEP)
    strike()
    return driver.follow()


def check(run: RunFolder, undisturbed: Path, fault: str, seconds: float) -> None:
    verdict = compare(0, fault, run.path, undisturbed, [])
    print(f"{fault}: went on after {seconds:.1f} s", flush=True)
    assert verdict.mismatches == [], verdict
    assert (verdict.repeated, verdict.missing) == (0, 0), verdict


@dataclass
class Nodes:
    """A cluster without a shared folder, what runs on it read, and what they are held against."""

    cluster: Cluster
    inputs: Path
    undisturbed: Path

    def begin(self, number: int, name: str, **run: object) -> trained.Driver:
        """Begin a run from a host."""
        return trained.begin(self.cluster, number, self.inputs, name, **run)


@pytest.fixture
def nodes(
    request: pytest.FixtureRequest, tmp_path: Path, inputs: Path, undisturbed: Path
) -> Iterator[Nodes]:
    """Three hosts; with the parameter "redis" their head keeps its state there."""
    on_redis = getattr(request, "param", "") == "redis"
    if why := missing(redis=on_redis):
        pytest.skip(why)
    with hosts(3, cpus=ROOM, disks=tmp_path, on_redis=on_redis) as cluster:
        yield Nodes(cluster, inputs, undisturbed)


def times(request: pytest.FixtureRequest) -> range:
    count: int = request.config.getoption("--faults")
    return range(count)


def workers_host(cluster: Cluster) -> int:
    """Return the number of a host that has training workers."""
    return next(n for n in (1, 2) if cluster.processes(n, "ray::RayTrainWorker"))


def test_killed_raylet(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """The run goes on by itself on the host that is left; the other one joins again."""
    for k in times(request):
        driver, lost = nodes.begin(0, f"raylet{k}"), []

        def strike(lost: list[int] = lost) -> None:
            lost.append(workers_host(nodes.cluster))
            assert nodes.cluster.kill(lost[0], "raylet/raylet") == 1

        code, seconds = struck(driver, strike)
        assert code == 0, driver.told()
        check(driver.run, nodes.undisturbed, "killed raylet", seconds)
        nodes.cluster.kill(lost[0])
        nodes.cluster.start(lost[0], ROOM)


def test_killed_host(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """As above, but nothing of the host says a word any more."""
    for k in times(request):
        driver, lost = nodes.begin(0, f"host{k}"), []

        def strike(lost: list[int] = lost) -> None:
            lost.append(workers_host(nodes.cluster))
            nodes.cluster.kill(lost[0])

        code, seconds = struck(driver, strike)
        assert code == 0, driver.told()
        check(driver.run, nodes.undisturbed, "killed host", seconds)
        nodes.cluster.start(lost[0], ROOM)


def test_pulled_cable(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """For 20 s; whether Ray gives the host up meanwhile or not, the run goes on by itself."""
    for k in times(request):
        driver = nodes.begin(0, f"cable{k}")
        code, seconds = struck(
            driver, lambda: nodes.cluster.cut(workers_host(nodes.cluster), CUT_S)
        )
        assert code == 0, driver.told()
        check(driver.run, nodes.undisturbed, "pulled cable", seconds)
        for number in (1, 2):
            if not nodes.cluster.processes(number, "raylet/raylet"):
                nodes.cluster.kill(number)
                nodes.cluster.start(number, ROOM)


@pytest.mark.parametrize("nodes", ["redis"], indirect=True)
def test_killed_head_with_the_driver(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """The run ends with the driver; submitted again it goes on from its last checkpoint."""
    for k in times(request):
        driver = nodes.begin(0, f"head{k}")
        driver.until_step(AT_STEP)
        nodes.cluster.kill(0)
        began = time.monotonic()
        nodes.cluster.start(0, 0)
        again = nodes.begin(0, f"head{k}")
        before = time.monotonic() - began
        code, seconds = again.follow()
        assert code == 0, again.told()
        check(driver.run, nodes.undisturbed, "killed head and driver", before + seconds)


@pytest.mark.parametrize("nodes", ["redis"], indirect=True)
def test_killed_head(nodes: Nodes, request: pytest.FixtureRequest) -> None:
    """The driver is on another host and goes on when the head is back."""

    def strike() -> None:
        nodes.cluster.kill(0)
        nodes.cluster.start(0, 0)

    for k in times(request):
        driver = nodes.begin(1, f"other{k}")
        code, seconds = struck(driver, strike)
        assert code == 0, driver.told()
        check(driver.run, nodes.undisturbed, "killed head", seconds)
