"""Keeping: a sweep's trials in; leaderboard, best recipe and best adapter out, in its folder."""

from __future__ import annotations

import shutil

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.durable import whole_folder
from raytune_ft.errors import TrainingError
from raytune_ft.resume import shown
from raytune_ft.sweeping import lineage, page
from raytune_ft.sweeping.board import write_leaderboard
from raytune_ft.sweeping.course import keep_states
from raytune_ft.sweeping.folder import BEST, BEST_RECIPE
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import DONE, FAILED, Trial, ranked
from raytune_ft.training.run_folder import RunFolder


def keep(recipe: Recipe, trials: list[Trial], folder: RunFolder) -> Trial:
    """Write what a sweep found; return the best trial.

    Raises:
        TrainingError: no trial finished; says why the first one failed.
    """
    keep_states(trials)
    write_leaderboard(folder.path, recipe.tune, trials)
    page.write_reports(trials)
    best = ranked(trials, recipe.tune.mode)[0]
    if best.state != DONE:
        page.write_page(folder)
        failed = next((t for t in trials if t.state.startswith(FAILED)), best)
        raise TrainingError(
            f"{shown(folder)}: no trial finished; trial {failed.number} {failed.state}; see "
            f"{shown(folder)}/trials/{failed.name}/run.log"
        )
    own = with_values(recipe, best.values)
    # its values belong to the sweep, name and place to whoever trains it
    run = own.run.model_copy(update={"name": None})
    content = lineage.note_of(best) + loader.dump_yaml(own.model_copy(update={"run": run}))
    with whole_folder(folder.path / BEST) as place:
        shutil.copytree(_result_of(best), place, dirs_exist_ok=True)
    lineage.write(folder.path, trials, best)
    temporary = folder.path / f".{BEST_RECIPE}"
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(folder.path / BEST_RECIPE)
    shutil.rmtree(folder.path / "ray", ignore_errors=True)  # Ray Tune's own record of attempts
    folder.update(status="done", best=best.number)
    page.write_page(folder)
    return best


def _result_of(trial: Trial) -> str:
    folder = RunFolder(trial.folder)
    return str(folder.adapter if folder.adapter.is_dir() else folder.model)
