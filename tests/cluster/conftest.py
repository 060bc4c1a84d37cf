"""Inputs of runs on hosts, and the run that nothing disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import trained
from tests.cluster.hosts import Cluster, missing


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows: `model` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    trained.make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """The folder of a run of 4 workers on one machine, a host with a Ray of its own."""
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("one")
    cluster = Cluster(disks=folder)
    try:
        cluster.boot(0)
        driver = trained.begin(cluster, 0, inputs, "one", alone=True)
        while driver.end() and "Ray did not start" in driver.printed():  # on a busy machine
            driver = trained.begin(cluster, 0, inputs, "one", alone=True)
        assert driver.end() == 0, driver.told()
    finally:
        cluster.end()
    return driver.run.path
