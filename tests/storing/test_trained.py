"""Real training whose machine is lost: what came to S3, or home, goes on to the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.storing import carriage, fetching, steps
from raytune_ft.storing.carriage import Way, at_hand
from raytune_ft.storing.home import Home
from raytune_ft.storing.mirror import Mirror
from raytune_ft.storing.places import Place
from raytune_ft.training import worker
from raytune_ft.training.guarding import failures
from raytune_ft.training.run_folder import RunFolder, write_json
from raytune_ft.training.worker import Job
from tests.runs import adapter_of, sha256
from tests.training.test_worker import feed_of, ledger, recipe, train, whole

__all__ = ["recipe", "whole"]  # fixtures

RESULT = "adapter/adapter_model.safetensors"
SAVED = 4


class LostError(RuntimeError):
    """The machine is gone."""


def job_of(recipe: Recipe, run: RunFolder) -> Job:
    return Job(
        recipe.model_dump(mode="json"), str(run.path), recipe.model.path,
        expected_steps=9, sharing=64, data_fingerprint="sha-1",
    )  # fmt: skip


def prepared(run: RunFolder) -> RunFolder:
    """Write what a driver writes before its workers begin."""
    run.path.mkdir(parents=True)
    run.update(name="a1", status="running")
    write_json(run.path / "data.json", {"rows": 1, "used": 1, "formats": ["openai"], "steps": 9})
    failures.begin(run)
    return run


def lost_when(recipe: Recipe, sent: Callable[[], int]) -> Callable[[Position], Iterator[Placed]]:
    """Return packs that end with the machine, once a checkpoint of step SAVED has been sent."""
    feed = feed_of(recipe)

    def packs(start: Position) -> Iterator[Placed]:
        for placed in iter_packs(feed, start, epochs=recipe.train.epochs):
            if placed.behind.epoch and placed.behind >= Position(1):
                deadline = time.monotonic() + 120
                while sent() < SAVED and time.monotonic() < deadline:
                    time.sleep(0.05)
                if sent() >= SAVED:
                    raise LostError
            yield placed

    return packs


def last_in(folder: Any) -> int:
    return steps.last_whole(steps.steps_in(folder.names(steps.CHECKPOINTS)))


def check(run: RunFolder, whole: RunFolder) -> None:
    assert sha256(run.path / RESULT) == sha256(whole.path / RESULT)
    assert adapter_of(run.path).keys() == adapter_of(whole.path).keys()
    assert ledger(run) == ledger(whole)


def test_a_run_on_s3_goes_on_elsewhere(
    recipe: Recipe, whole: RunFolder, bucket: str, tmp_path: Path
) -> None:
    place = Place(f"{bucket}/runs/a1")
    run = prepared(RunFolder(tmp_path / "lost/a1"))
    mirror = Mirror(run, place, place.address, -1).__enter__()
    with pytest.raises(LostError):
        worker.run(job_of(recipe, run), lost_when(recipe, lambda: last_in(place)), None, print)
    mirror._over.set()  # nothing is sent any more
    mirror._thread.join()

    other = RunFolder(tmp_path / "other/a1")
    fetching.bring(place, other, to_train=True, tell=fetching.silent)
    with Mirror(other, place, place.address, -1):
        train(recipe, other.path)
    check(other, whole)
    assert place.read(RESULT) == (whole.path / RESULT).read_bytes()
    assert last_in(place) == len(ledger(whole))


@pytest.mark.ray
@pytest.mark.usefixtures("started")
def test_a_run_on_a_node_without_its_folder_goes_on_on_another(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    run = prepared(RunFolder(tmp_path / "drivers/a1"))
    home = ray.remote(Home).options(num_cpus=0, max_concurrency=8).remote(str(run.path))
    way = Way(str(run.path), "of another machine", home)
    feed = feed_of(recipe)

    def goes_on(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=recipe.train.epochs)

    def lost() -> int:
        return steps.last_whole(steps.steps_here(run.checkpoints))

    ended: list[str] = []
    monkeypatch.setattr(carriage.HomeMirror, "settle", lambda _: None)  # it is killed
    for node, packs in (("first", lost_when(recipe, lost)), ("second", goes_on)):
        monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / node))
        with at_hand(way) as place:
            work = job_of(recipe, run)
            try:
                place.train(work, 0, lambda job, p=packs: worker.run(job, p, None, print))
            except LostError:
                ended.append(node)
        monkeypatch.undo()
    assert ended == ["first"]
    check(run, whole)
