"""`python -m raytune_ft.train --config NAME_OR_FILE [key=value ...]`: the whole way of one run.

Names and folder are looked at first, since a mistake in them should not wait for anything. Then Ray
starts, in a thread, while the rest is imported: `running` goes on from there.
"""

from __future__ import annotations

from raytune_ft.cluster import noise_to, ray_beside
from raytune_ft.config.schema import Recipe
from raytune_ft.last_words import spoken_for
from raytune_ft.new_run import open_or_make, removed_unless_started
from raytune_ft.resume import unheard
from raytune_ft.storing.fetching import desks_of, mirrored
from raytune_ft.training.guarding.attending import attended, end_kept


def train(recipe: Recipe, *, source: str, resume: str | None = None) -> int:
    """Train a recipe; return the exit code.

    Args:
        recipe: with `resume`, the recipe of that run.
        source: what the user called the recipe, for the run's name and record.
        resume: folder or address of a run to go on with, from its last checkpoint; a run of the
            recipe's name is gone on with as well.
    """
    from raytune_ft import survey  # a second of imports; Ctrl-C there is answered in a line

    survey.check_names(recipe)
    survey.check_deepspeed(recipe)
    survey.model_folder(recipe.model.path)
    run = open_or_make(recipe, source, resume)
    if run is None:
        return 0
    folder = run.folder
    with (
        removed_unless_started(folder),
        noise_to(folder.log) as terminal,
        spoken_for(lambda: unheard(folder), terminal.fileno()) as call_off,
        attended(folder, *desks_of(folder)),
        mirrored(folder, recipe.checkpoint.keep) as mirror,
        end_kept(folder),
        ray_beside() as ray_start,
    ):
        from raytune_ft.running import carry_out  # seconds of imports, in which Ray starts

        return carry_out(
            recipe, folder, source, goes_on=run.goes_on,
            ray_start=ray_start, terminal=terminal, call_off=call_off, mirror=mirror,
        )  # fmt: skip


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("train")
