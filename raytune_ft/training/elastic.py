"""Elastic: a recipe for some number of workers in, the same optimizer steps for fewer out.

A step's packs stay, each rank makes as many passes as the fullest one needs, and a rank that has
no pack left passes a batch without a label, which adds zero: what `batching` does at an epoch's
end. So any number of workers will do, whether it divides the packs of a step or not, and sums
differ by the order of their additions alone. Dropout draws by rank, so with it the draws differ.
"""

from __future__ import annotations

from raytune_ft.config.schema import Recipe


def shared_out(recipe: Recipe, workers: int) -> Recipe:
    """Return a recipe's part for so many workers, in passes of the same size.

    Its `global_batch_size` may be larger than a step, which the ranks' last passes do not fill.

    Args:
        recipe: as it was asked for.
        workers: that there are, at least 1.
    """
    if workers == recipe.run.workers:
        return recipe
    passes = -(-recipe.global_batch_size // (recipe.train.micro_batch_size * workers))
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"accumulation": passes}),
            "run": recipe.run.model_copy(update={"workers": workers}),
        }
    )


def line(recipe: Recipe, shared: Recipe) -> str:
    """Say with how many workers a run goes on.

    Args:
        recipe: as it was asked for.
        shared: of `shared_out`.
    """
    return (
        f"{shared.run.workers} of {recipe.run.workers} workers: the same steps of "
        f"{recipe.global_batch_size} packs, {shared.train.accumulation} passes per worker "
        f"instead of {recipe.train.accumulation}"
    )
