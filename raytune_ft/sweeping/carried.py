"""Carried: a trial's folder on the node where the trial runs, whether or not that has the sweep's.

As workers of single runs do (`storing.carriage`), a trial on a node without the driver's disk works
in a folder of its own, begun with what the driver's holds, and what it writes is carried home,
checkpoints before their manifests. Only behind that the trial says what became of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from raytune_ft.config.schema import Recipe
from raytune_ft.data.stream import on_node
from raytune_ft.errors import CheckpointError, RaytuneError
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.screen import Screen
from raytune_ft.storing import carriage, fetching
from raytune_ft.storing.carriage import Way
from raytune_ft.storing.home_folder import HomeFolder, asked
from raytune_ft.storing.mirror import Mirror, stamps
from raytune_ft.sweeping.trials import FOLDER
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.worker import Job

HERE = "the driver's node"
RECORDS = ("run.json", "data.json")
"""Of the sweep: what trials read."""


@dataclass(frozen=True)
class Place:
    """Where a trial works."""

    sweep: RunFolder
    """The sweep's folder, or what of it trials read."""
    folder: RunFolder
    """The trial's."""
    home: Any = None
    """The actor that holds the driver's folder, on another node; None: this is it."""
    node: str | None = None
    """Id of that node."""

    def located(self, job: Job) -> Job:
        """Return the trial's job with the paths that this node has; fetch what it lacks.

        Raises:
            ModelError: the model could not be brought here.
        """
        return job if self.home is None else carriage.located(job, self.folder, self.home)

    def prepared(self, recipe: Recipe, drivers: RunFolder, source: str) -> Prepared:
        """Prepare a trial that has rows of its own where the rows are: on the driver's node.

        Args:
            recipe: of the trial.
            drivers: its folder there.
            source: what the user called the sweep's recipe.
        """
        if self.home is None:
            return _prepared(recipe, drivers, source)
        task = ray.remote(num_cpus=0)(_prepared).options(scheduling_strategy=on_node(self.node))
        try:
            prepared: Prepared = ray.get(task.remote(recipe, drivers, source))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, RaytuneError) else error from None
        carriage.fill(self.folder, HomeFolder(self.home, inside=f"{FOLDER}/{drivers.path.name}"))
        self.folder.update(driver=liveness.this_process())  # not the task's, which has ended
        return prepared


@contextmanager
def at_hand(way: Way, name: str, keep: int) -> Iterator[Place]:
    """Yield where a trial works on this node; behind the block all of it is home.

    Args:
        way: to the sweep's folder.
        name: of the trial.
        keep: `checkpoint.keep`.

    Raises:
        CheckpointError: the driver's node does not answer, or another process writes this trial.
    """
    inside = f"{FOLDER}/{name}"
    if carriage.is_homes(way):
        if way.home is not None:
            with suppress(CheckpointError):  # no other node writes from now on
                asked(way.home.begin.remote(carried=False, inside=inside))
        sweep = RunFolder(way.path)
        yield Place(sweep, _made(sweep, inside))
        return
    sweep, home = carriage.copy_of(way), HomeFolder(way.home)
    with carriage.alone(sweep.path):
        for record in RECORDS:
            fetching.fetch_file(home, sweep, record)
    there = HomeFolder(way.home, asked(way.home.begin.remote(carried=True, inside=inside)), inside)
    shutil.rmtree(sweep.path / inside, ignore_errors=True)  # of a process that was killed
    folder = _made(sweep, inside)
    try:
        carriage.fill(folder, there)
        known = stamps(folder)
        with Mirror(folder, there, HERE, keep, every_s=carriage.SMALL_S, known=known):
            yield Place(sweep, folder, way.home, way.node)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)  # a node may see many trials


def _prepared(recipe: Recipe, folder: RunFolder, source: str) -> Prepared:
    screen = Screen(recipe.train.log_every, console=Console(highlight=False))
    return prepare(recipe, folder, source, screen)


def _made(sweep: RunFolder, inside: str) -> RunFolder:
    folder = RunFolder(sweep.path / inside)
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder
