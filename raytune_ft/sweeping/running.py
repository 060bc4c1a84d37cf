"""Running: a course in, the trials that are left run to their ends, by Ray Tune or on one base.

Here meet the forecast, which says how many trials there is room for, the windows that all of them
share, and who shows what they say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray

from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import Supply, feeding
from raytune_ft.errors import CheckpointError
from raytune_ft.mailbox import Mailbox
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.resume import shown
from raytune_ft.screen import Screen
from raytune_ft.storing import carriage
from raytune_ft.sweeping import forecast, on_ray, together
from raytune_ft.sweeping.board import Board
from raytune_ft.sweeping.course import Course
from raytune_ft.sweeping.generations import course_of
from raytune_ft.sweeping.one_trial import Orders
from raytune_ft.sweeping.page import Pages
from raytune_ft.sweeping.searching import search_for
from raytune_ft.sweeping.space import Space
from raytune_ft.sweeping.trials import Ledger, Trial
from raytune_ft.training.run_folder import RunFolder


def run_all(recipe: Recipe, folder: RunFolder, source: str, screen: Screen) -> list[Trial]:
    """Run all trials of a sweep that are not over; return all. Ray must be running.

    Raises:
        RecipeError, ModelError, DataError, MemoryPlanError: nothing could run.
        CheckpointError: the sweep that goes on had other rows.
        Interrupted: a signal asked for the end; the sweep can be taken up again.
    """
    prepared = prepare(_caching(recipe), folder, source, screen)
    _check_rows(folder, prepared.job.data_fingerprint)
    steps = prepared.job.expected_steps
    course = course_of(recipe, Ledger.read(folder.path), search_for(recipe), steps)
    with Board(screen, recipe.tune, steps) as board:
        board.update(course.trials)
        _run_left(prepared, course, board, folder, screen)
    return course.trials


def _check_rows(folder: RunFolder, fingerprint: str) -> None:
    """Refuse to go on with other rows: every trial that had begun would fail, for good."""
    known = folder.info().get("data_fingerprint")
    if known is not None and known != fingerprint:
        raise CheckpointError(
            f"{shown(folder)}: rows have changed since this sweep began; put the files back as "
            "they were, or sweep under another run.name"
        )
    folder.update(data_fingerprint=fingerprint)


def _run_left(
    prepared: Prepared, course: Course, board: Board, folder: RunFolder, screen: Screen
) -> None:
    recipe = course.recipe
    left = [trial.values for trial in course.trials if not trial.is_over]
    asks = not search_for(recipe).planned()
    if not left and not asks:
        return
    plan = forecast.forecast(
        recipe, recipe.tune.trials if asks else len(left), values=None if asks else left,
        steps=prepared.job.expected_steps, cluster=ray.cluster_resources(),
    )  # fmt: skip
    for line in plan.lines:
        screen.line(line)
    pages = Pages(folder)

    def show(trials: list[Trial]) -> None:
        board.update(trials)
        pages.update()

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    job = replace(prepared.job, sharing=plan.concurrent, gpu_share=plan.gpu_share or 1.0)
    with _windows(recipe, prepared, plan.concurrent, folder) as supply:
        orders = Orders(job, mailbox, supply, carriage.way_of(folder))
        if recipe.tune.shared_base:
            together.carry_out(course, orders, show=show, screen=screen)
        else:
            on_ray.carry_out(course, orders, plan, show=show, screen=screen)


@contextmanager
def _windows(
    recipe: Recipe, prepared: Prepared, readers: int, folder: RunFolder
) -> Iterator[Supply | None]:
    """Have windows made once for all trials while the block runs; None if their rows differ."""
    if Space.of(recipe).own_rows:
        yield None
        return
    with feeding(prepared.kinds, readers=readers, begin=("train",), keeps=True) as supply:
        yield supply
        folder.update(windows_made=supply.state("train")["made"])


def _caching(recipe: Recipe) -> Recipe:
    """Have tokens of rows kept, so that later epochs and a driver that comes later find them."""
    data = recipe.data.model_copy(update={"cache": True})
    return recipe.model_copy(update={"data": data})
