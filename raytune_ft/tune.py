"""`python -m raytune_ft.tune --config FILE`: Ray Tune over the same training function.

Read top to bottom: a folder, new or of a sweep that goes on -> rows, once -> the ledger of trials,
and the course that follows from it -> Ray Tune runs what is left, each trial a whole run folder
under `SWEEP/trials/` -> the best recipe and its adapter.
"""

from __future__ import annotations

from rich.console import Console

from raytune_ft.cluster import noise_to, ray_session
from raytune_ft.config.schema import Recipe
from raytune_ft.last_words import spoken_for
from raytune_ft.new_run import removed_unless_started
from raytune_ft.screen import Screen
from raytune_ft.storing import fetching
from raytune_ft.storing.fetching import desks_of
from raytune_ft.sweeping import trials
from raytune_ft.sweeping.checks import check
from raytune_ft.sweeping.folder import kept_state, mirrored, open_sweep, unheard
from raytune_ft.sweeping.searching import search_for
from raytune_ft.sweeping.trials import Trial
from raytune_ft.training.guarding.attending import attended, end_kept
from raytune_ft.training.run_folder import RunFolder


def tune(
    recipe: Recipe,
    *,
    source: str,
    dry_run: bool = False,
    as_json: bool = False,
    resume: str | None = None,
) -> int:
    """Run the sweep of `recipe.tune`; return the exit code.

    A trial that fails is listed with its reason and does not stop the others.

    Args:
        recipe: with `resume`, the recipe of that sweep.
        source: what the user called the recipe, for the sweep's name and record.
        dry_run: print what would be tried, and what that takes.
        as_json: print it as plain values.
        resume: folder of a sweep to go on with; trials that are over do not run again.

    Raises:
        RecipeError: the space cannot be, or workers are more than one.
        TrainingError: no trial finished.
        Interrupted: it was asked to stop, or Ray was lost; it can be taken up again.
    """
    check(recipe)
    if dry_run:
        from raytune_ft.sweeping import forecast

        return forecast.print_dry_run(recipe, planned(recipe), as_json=as_json)
    folder = open_sweep(recipe, source, resume)
    if folder is None:
        return 0
    with (
        removed_unless_started(folder),
        noise_to(folder.log) as terminal,
        spoken_for(lambda: unheard(folder), terminal.fileno()),
        attended(folder, *desks_of(folder)),
        mirrored(folder, recipe.checkpoint.keep) as mirror,
        end_kept(folder),
        kept_state(folder),
    ):
        from raytune_ft.sweeping.keeping import keep

        console = Console(file=terminal, highlight=False)
        screen = Screen(recipe.train.log_every, console=console, kept=folder.lines)
        if mirror is not None:
            mirror.say = lambda line: screen({"kind": "warning", "text": line})
        best = keep(recipe, sweep(recipe, folder, source, screen), folder)
        if mirror is not None:
            mirror.settle()
        where = fetching.shown_address(folder) or str(folder.path)
        screen.line(f"best recipe: {where}/best.yaml   its adapter: {where}/best")
        screen.line(f"all trials on one page: {where}/sweep.html")
        screen.line(f"talk to it: raytune-ft chat {where}/trials/{best.name}")
    return 0


def planned(recipe: Recipe) -> list[Trial]:
    """List the trials that a sweep would have; without values where a search asks as it goes."""
    values = search_for(recipe).planned() or [{} for _ in range(recipe.tune.trials)]
    return [
        Trial(i, trials.name_of(i), each, None, 0, trials.WAITING, RunFolder(".").path, 0.0)
        for i, each in enumerate(values)
    ]


def sweep(recipe: Recipe, folder: RunFolder, source: str, screen: Screen) -> list[Trial]:
    """Run all trials that are not over; return all."""
    screen.stage("ray")
    with ray_session():
        from raytune_ft.sweeping.running import run_all

        return run_all(recipe, folder, source, screen)


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("tune")
