"""Running: a folder and a Ray that is starting in, a run that has come to its end out.

Read top to bottom: memory -> workers, which start and import -> rows meanwhile -> a feeder, which
has windows of packs made -> the workers are told their job, each running `training.worker.run` on
its share of one sequence -> report and summary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from rich.console import Console

from raytune_ft import claim, outlook
from raytune_ft.cluster import RayBeside, session_folder
from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import feeding
from raytune_ft.fitting import Workers
from raytune_ft.lost_ray import seen_to_the_end
from raytune_ft.outlook import Outlook
from raytune_ft.preparation import prepare
from raytune_ft.resume import resumable, shown
from raytune_ft.screen import Screen
from raytune_ft.storing.mirror import Mirror
from raytune_ft.training import layouts
from raytune_ft.training.guarding import disk
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching import reporting

DATA_TASKS = 2
"""Windows of rows made at once; a core tokenises for several GPUs."""


def carry_out(
    recipe: Recipe,
    folder: RunFolder,
    source: str,
    *,
    goes_on: bool,
    ray_start: RayBeside,
    terminal: TextIO,
    call_off: Callable[[], None],
    mirror: Mirror | None = None,
) -> int:
    """Train a recipe; return the exit code.

    Args:
        recipe: its names are checked.
        folder: of the run; it may be empty.
        source: what the user called the recipe, for the run's record.
        goes_on: whether the run began before.
        ray_start: Ray, which may not be there yet.
        terminal: where people look; standard output and error go to the log meanwhile.
        call_off: of `last_words.spoken_for`.
        mirror: sends the run to where it is kept, if that is elsewhere.
    """
    kept = layouts.kept_choice(folder, recipe) if goes_on else None
    seen = outlook.check_memory(recipe, kept)
    with resumable(folder, shown(folder)), reporting.left_with_report(folder):
        screen = Screen(
            recipe.train.log_every,
            console=Console(file=terminal, highlight=False),
            kept=folder.lines,
        )
        if mirror is not None:
            mirror.say = lambda line: screen({"kind": "warning", "text": line})
        if seen is not None:
            screen.line(seen.line())
        with screen.live():
            screen.stage("ray")
            if warning := disk.check_ray(session_folder()):
                screen({"kind": "warning", "text": warning})
            ray_start.wait()
            for line in claim.lines(recipe):
                screen.line(line)
            with seen_to_the_end(folder, shown(folder), screen, terminal, call_off):
                _fit(recipe, folder, source, screen, seen, goes_on=goes_on, is_laid_out=bool(kept))
            folder.update(status="done")
            screen.stage("report")
            reporting.write_report(folder)
            if mirror is not None:
                mirror.settle()
        screen.summary(reporting.summarize(folder), shown(folder), next_commands(folder))
    return 0


def _fit(
    recipe: Recipe,
    folder: RunFolder,
    source: str,
    screen: Screen,
    seen: Outlook | None,
    *,
    goes_on: bool,
    is_laid_out: bool,
) -> None:
    """Start workers, prepare meanwhile, see the workers to their end."""
    workers = Workers(recipe, folder)
    prepared = prepare(recipe, folder, source, screen)
    folder.update(plan={"parts": seen.parts} if seen is not None else None)
    if not is_laid_out:
        chosen = seen.choice if seen is not None else None
        folder.update(layout=chosen.to_json() if chosen is not None else None)
    if seen is not None and (time := seen.time(recipe, prepared.job.expected_steps)):
        screen.line(time)
    with feeding(
        prepared.kinds,
        readers=recipe.run.workers,
        at_once=max(DATA_TASKS, recipe.run.workers),
        begin=() if goes_on else ("train",),
    ) as supply:
        workers.fit(prepared.job, supply, screen)
        folder.update(windows_made=supply.state("train")["made"])


def next_commands(folder: RunFolder) -> list[str]:
    """Suggest what people do after a run."""
    run = shown(folder)
    return [
        f"raytune-ft chat {run}",
        f"raytune-ft merge {run}",
        f"raytune-ft serve {run}",
        f"raytune-ft export {run} --out my-adapter",
    ]
