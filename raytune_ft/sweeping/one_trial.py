"""One trial: its values and the sweep's orders in, a whole run folder out; in a process of its own.

What trains is `training.worker.run`, as in any run, and the folder is as any run's: a trial goes on
from its last checkpoint, in a sweep that is taken up or alone by `raytune-ft train --resume`.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune as ray_tune

from raytune_ft import export
from raytune_ft.cluster import noise_to
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import Supply, feeding
from raytune_ft.errors import Interrupted, RaytuneError
from raytune_ft.fitting import asked_by
from raytune_ft.storing.carriage import Way
from raytune_ft.sweeping import carried
from raytune_ft.sweeping.carried import Place
from raytune_ft.sweeping.course import is_trained, result_of
from raytune_ft.sweeping.inheriting import Pause
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import FOLDER, name_of
from raytune_ft.training import worker
from raytune_ft.training.guarding import liveness
from raytune_ft.training.guarding.failures import last_line
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.guarding.interruption import AskedToEnd
from raytune_ft.training.run_folder import Event, RunFolder, read_json
from raytune_ft.training.worker import Job

INHERITED = ("source", "model_folder", "load_from_sha256")
"""What a trial's record has of the sweep's; the rest is its own recipe's."""
DESCRIBED = ("template", "method", "quantization", "double_quant", "eos_token", "new_tokens")
"""Fields of `model` that a run's record repeats."""
SHOWN = ("step", "seconds", "loss", "val_loss", "lr")


@dataclass(frozen=True)
class Orders:
    """What all trials of a sweep are told."""

    job: Job
    """Of the sweep's own recipe; each trial has another one."""
    mailbox: Any
    """Says whether trials are to stop."""
    supply: Supply | None
    """Windows that all trials share; None: each prepares rows of its own."""
    way: Way
    """To the sweep's folder, from any node."""

    def home_of(self, name: str) -> RunFolder:
        """Return a trial's folder as the driver has it."""
        return RunFolder(Path(self.job.run_path) / FOLDER / name)


def run_trial(config: Mapping[str, Any], orders: Orders) -> None:
    """Train one trial in this process; tell Ray Tune each step, and at the end what became of it.

    Args:
        config: `number`, `values`, a text of JSON since Ray Tune would look for its own words in
            it, and `until`, as the course says it.
        orders: as every trial has them.
    """
    asked = Recipe.model_validate(orders.job.recipe)
    name, values = name_of(int(config["number"])), json.loads(config["values"])
    pause = Pause(config["until"], asked.tune.metric)
    with carried.at_hand(orders.way, name, asked.checkpoint.keep) as place:
        outcome = _outcome(values, orders, place, pause)
    ray_tune.report(outcome)


def _outcome(values: Mapping[str, Any], orders: Orders, place: Place, pause: Pause) -> Event:
    folder = place.folder
    try:
        with noise_to(folder.log):
            return _trained(values, orders, place, pause)
    except Interrupted:
        folder.update(status="stopped")
        return {"outcome": "interrupted"}
    except Exception as error:
        words = str(error) if isinstance(error, RaytuneError) else _words(error)
        if folder.run_json.is_file():
            folder.update(status="failed")
        return {"outcome": "failed", "reason": words}


def _trained(values: Mapping[str, Any], orders: Orders, place: Place, pause: Pause) -> Event:
    """Train to the end or to the pause, unless that was done; return the outcome."""
    asked, folder = Recipe.model_validate(orders.job.recipe), place.folder
    try:
        if not is_trained(folder) and not pause.find(folder):
            recipe = recipe_of(asked, values, orders.home_of(folder.path.name))
            _train(recipe, orders, place, pause)
            folder.update(status="done")
    except Interrupted:
        if pause.reached is None:
            raise
        folder.update(status="stopped")
    except Exception:
        traceback.print_exc()  # into the trial's own log
        raise
    if pause.reached is not None and not is_trained(folder):
        return {"outcome": "paused", **pause.reached}
    result = result_of(folder, asked.tune.metric)
    return {"outcome": "done", "metric": result.metric, "step": result.step}


def _train(recipe: Recipe, orders: Orders, place: Place, pause: Pause) -> None:
    def report(event: Event) -> None:
        if event["kind"] == "step":
            pause.hear(event)
            ray_tune.report({key: event.get(key) for key in (*SHOWN, pause.metric)})

    def is_paused() -> bool:
        return pause.reached is not None

    with (
        fed(recipe, orders, place) as (job, supply),
        AskedToEnd() as killed,
        asked_by(orders.mailbox) as stopping,
    ):
        packs, validation = supply.of_rank(0)
        guards = Guards(interrupted=lambda: killed() or stopping() or is_paused())
        worker.run(place.located(job), packs, validation, report, guards)


@contextmanager
def fed(recipe: Recipe, orders: Orders, place: Place) -> Iterator[tuple[Job, Supply]]:
    """Make the trial's folder; yield its job, and windows while the block runs."""
    if orders.supply is None:
        with _fed_alone(recipe, orders, place) as fed:
            yield fed
        return
    begin_folder(recipe, place.sweep, place.folder)
    epochs = {**orders.supply.epochs, "train": recipe.train.epochs}
    job = job_of(orders.job, recipe, place.sweep, place.folder)
    yield job, replace(orders.supply, epochs=epochs)


@contextmanager
def _fed_alone(recipe: Recipe, orders: Orders, place: Place) -> Iterator[tuple[Job, Supply]]:
    """Prepare a trial whose rows, packs or base are its own, as `raytune-ft train` would."""
    source = str(place.sweep.info().get("source", ""))
    prepared = place.prepared(recipe, orders.home_of(place.folder.path.name), source)
    job = replace(prepared.job, sharing=orders.job.sharing, gpu_share=orders.job.gpu_share)
    with feeding(prepared.kinds, node=place.node, begin=("train",)) as supply:
        yield job, supply


def recipe_of(asked: Recipe, values: Mapping[str, Any], folder: RunFolder) -> Recipe:
    """Return a trial's recipe, by which it is a run of its own among the sweep's trials."""
    recipe = with_values(asked, values)
    run = recipe.run.model_copy(
        update={"name": folder.path.name, "storage": str(folder.path.parent)}
    )
    return recipe.model_copy(update={"run": run})


def begin_folder(recipe: Recipe, sweep: RunFolder, folder: RunFolder) -> None:
    """Make a trial's folder, or take it over from a driver that was killed."""
    info = sweep.info()
    if folder.run_json.is_file():
        folder.update(status="running", driver=liveness.this_process())
        return
    kept = {key: info.get(key) for key in INHERITED}
    own = {key: getattr(recipe.model, key) for key in DESCRIBED}
    name = f"{info['name']}_{folder.path.name}"
    shutil.copy(sweep.path / "data.json", folder.path / "data.json")
    system = export.system_of(recipe)
    folder.create(name, loader.dump_yaml(recipe), **kept, **own, system=system)


def job_of(job: Job, recipe: Recipe, sweep: RunFolder, folder: RunFolder) -> Job:
    """Return a trial's job, whose steps are its own."""
    steps, epochs = job.expected_steps, Recipe.model_validate(job.recipe).train.epochs
    if not job.counted:
        steps = steps_of(recipe, read_json(sweep.path / "data.json")["packs"])
    return replace(
        job, recipe=recipe.model_dump(mode="json"), run_path=str(folder.path),
        expected_steps=steps, sure=job.sure and recipe.train.epochs <= epochs,
    )  # fmt: skip


def steps_of(recipe: Recipe, packs: int) -> int:
    """Return the optimizer steps of a run over so many packs per epoch."""
    steps = recipe.train.epochs * -(-packs // recipe.global_batch_size)
    return min(steps, recipe.train.max_steps or steps)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {last_line(error)}"
