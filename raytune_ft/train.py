"""`python -m raytune_ft.train --config NAME_OR_FILE [key=value ...]`: the whole way of one run.

Read top to bottom: recipe -> rows -> a feeder, which has windows of packs made -> Ray Train
workers, each running `training.worker.run` on its share of one sequence -> report and summary.
"""

from __future__ import annotations

from rich.console import Console

from raytune_ft import outlook, survey
from raytune_ft.cluster import noise_to, session_folder
from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import feeding
from raytune_ft.fitting import fit, shown
from raytune_ft.lost_ray import seen_to_the_end
from raytune_ft.preparation import new_folder, prepare, removed_unless_started
from raytune_ft.resume import open_run, resumable
from raytune_ft.screen import Screen
from raytune_ft.training import layouts
from raytune_ft.training.guarding import disk
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching import reporting

DATA_TASKS = 2
"""Windows of rows made at once; a core tokenises for several GPUs."""


def train(recipe: Recipe, *, source: str, resume: str | None = None) -> int:
    """Train a recipe; return the exit code.

    Args:
        recipe: with `resume`, the recipe of that run.
        source: what the user called the recipe, for the run's name and record.
        resume: folder of a run to go on with, from its last checkpoint.
    """
    survey.check_names(recipe)
    survey.check_deepspeed(recipe)
    kept = layouts.kept_choice(RunFolder(resume), recipe) if resume else None
    seen = outlook.check_memory(recipe, kept)
    folder = open_run(resume, recipe) if resume else new_folder(recipe, source)
    if folder is None:
        return 0
    with (
        removed_unless_started(folder),
        resumable(folder, shown(folder)),
        noise_to(folder.path / "run.log") as terminal,
        reporting.left_with_report(folder),
    ):
        screen = Screen(
            recipe.train.log_every,
            console=Console(file=terminal, highlight=False),
        )
        if seen is not None:
            screen.line(seen.line())
        with screen.live():
            screen.stage("ray")
            if warning := disk.check_ray(session_folder()):
                screen({"kind": "warning", "text": warning})
            with seen_to_the_end(folder, shown(folder), screen, terminal):
                prepared = prepare(recipe, folder, source, screen)
                folder.update(plan={"parts": seen.parts} if seen is not None else None)
                if kept is None:
                    chosen = seen.choice if seen is not None else None
                    folder.update(layout=chosen.to_json() if chosen is not None else None)
                if seen is not None and (time := seen.time(recipe, prepared.job.expected_steps)):
                    screen.line(time)
                with feeding(
                    prepared.kinds,
                    readers=recipe.run.workers,
                    at_once=max(DATA_TASKS, recipe.run.workers),
                    shared_folder=folder.path.parent,
                    begin=() if resume else ("train",),
                ) as supply:
                    fit(prepared, supply, folder, screen)
                    folder.update(windows_made=supply.state("train")["made"])
            folder.update(status="done")
            screen.stage("report")
            reporting.write_report(folder)
        screen.summary(reporting.summarize(folder), shown(folder), next_commands(folder))
    return 0


def next_commands(folder: RunFolder) -> list[str]:
    """Suggest what people do after a run."""
    run = shown(folder)
    return [
        f"raytune-ft chat {run}",
        f"raytune-ft merge {run}",
        f"raytune-ft serve {run}",
        f"raytune-ft export {run} --out my-adapter",
    ]


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("train")
