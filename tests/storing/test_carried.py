"""A trial on a node without its sweep's folder: what it gets and sends, through a real actor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.storing import carriage
from raytune_ft.storing.carriage import Way
from raytune_ft.storing.home import Home
from raytune_ft.storing.home_folder import HomeFolder, asked
from raytune_ft.sweeping.carried import at_hand
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.worker import Job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("started")]

KEEP = 2
NAME = "trial_0003"
INSIDE = f"trials/{NAME}"


@pytest.fixture
def sweep(tmp_path: Path) -> RunFolder:
    """The driver's folder."""
    folder = RunFolder(tmp_path / "drivers/s1")
    folder.path.mkdir(parents=True)
    folder.update(name="s1", status="running", model_folder="m")
    (folder.path / "data.json").write_text('{"packs": 7}')
    return folder


@pytest.fixture
def way(sweep: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Way:
    """The way to a folder that this node does not have: its nonce is not what lies here."""
    import ray

    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "node"))
    home = ray.remote(Home).options(num_cpus=0, max_concurrency=8).remote(str(sweep.path))
    return Way(str(sweep.path), "of another machine", home)


def save(run: RunFolder, step: int, weight: float) -> None:
    weights = {"w": torch.full((4,), weight)}
    checkpoint.save(run.checkpoints, TrainState(step=step), weights, {}, keep=KEEP)


def newest(run: RunFolder) -> tuple[int, float]:
    folder = checkpoint.latest(run.checkpoints)
    assert folder is not None
    return checkpoint.step_of(folder), float(checkpoint.load(folder).weights["w"][0])


def test_where_the_driver_is_a_trial_is_in_its_sweep(sweep: RunFolder) -> None:
    with at_hand(carriage.way_of(sweep), NAME, KEEP) as place:
        assert place.folder.path == sweep.path / INSIDE
        job = Job({}, str(place.folder.path), "m", 3)
        assert place.located(job) == job


def test_elsewhere_it_begins_with_what_is_there_and_all_comes_home(
    sweep: RunFolder, way: Way, tmp_path: Path
) -> None:
    home = RunFolder(sweep.path / INSIDE)
    with at_hand(way, NAME, KEEP) as place:
        assert place.folder.path.is_relative_to(tmp_path / "node")
        assert place.sweep.info()["name"] == "s1"
        place.folder.update(name="t", status="running")
        for step in (1, 2):
            append_jsonl(place.folder.metrics, {"step": step})
            save(place.folder, step, float(step))
        place.folder.log.write_text("of the trial\n")
        place.folder.update(status="stopped")
    assert (home.info()["status"], newest(home)) == ("stopped", (2, 2.0))
    assert home.log.read_text() == "of the trial\n"
    assert not place.folder.path.exists()

    save(home, 2, 9.0)  # the driver gave it another trial's weights of that step
    with at_hand(way, NAME, KEEP) as place:
        assert newest(place.folder) == (2, 9.0)
        assert [event["step"] for event in read_jsonl(place.folder.metrics)] == [1, 2]
        save(place.folder, 3, 10.0)
        place.folder.adapter.mkdir()
        (place.folder.adapter / "w").write_text("trained")
        place.folder.update(status="done")
    assert newest(home) == (3, 10.0)
    assert (home.adapter / "w").read_text() == "trained"
    assert home.info() == {"name": "t", "status": "done"}


def test_what_ends_a_trial_brings_home_how_far_it_came(sweep: RunFolder, way: Way) -> None:
    with pytest.raises(SystemExit), at_hand(way, NAME, KEEP) as place:
        place.folder.update(name="t")
        save(place.folder, 5, 5.0)
        raise SystemExit  # as Ray Tune ends one that is stopped
    assert newest(RunFolder(sweep.path / INSIDE)) == (5, 5.0)


def test_each_trial_has_one_writer(sweep: RunFolder, way: Way) -> None:
    other = "trials/trial_0004"
    first = HomeFolder(way.home, asked(way.home.begin.remote(carried=True, inside=INSIDE)), INSIDE)
    beside = HomeFolder(way.home, asked(way.home.begin.remote(carried=True, inside=other)), other)
    second = asked(way.home.begin.remote(carried=True, inside=INSIDE))
    HomeFolder(way.home, second, INSIDE).write("metrics.jsonl", b"new")
    with pytest.raises(CheckpointError, match="a later start of this run's workers writes it"):
        first.write("metrics.jsonl", b"old")
    beside.write("metrics.jsonl", b"of another one")
    assert (sweep.path / INSIDE / "metrics.jsonl").read_bytes() == b"new"
    with pytest.raises(CheckpointError, match="another process trains this run"):
        only_writer(sweep.path / INSIDE, patience_s=0.2).__enter__()
    asked(way.home.begin.remote(carried=False, inside=INSIDE))
    with only_writer(sweep.path / INSIDE, patience_s=0.2):
        pass


def test_without_a_home_it_cannot_be_trained_there(way: Way) -> None:
    with pytest.raises(CheckpointError, match="does not have the run's folder"):
        at_hand(replace(way, home=None), NAME, KEEP).__enter__()
