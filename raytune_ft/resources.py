"""Resources: the workers that a recipe asks for, and the GPUs or cores that there are for them.

In: a recipe, or what Ray has. Out: a refusal before anything starts, where Ray would wait for ever;
the share of cores that each worker asks Ray for.
"""

from __future__ import annotations

import math
import os

from raytune_ft.config.estimates import gpus
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError

CPUS_PER_WORKER = 0.5
"""Less than a core, so that several workers find room on a small machine."""


def check(recipe: Recipe) -> None:
    """Refuse more workers than this machine has GPUs.

    Nothing is said where `RAY_ADDRESS` names a cluster, whose GPUs the driver does not know, where
    is no GPU, since ranks on a CPU share its cores, and where `run.min_workers` find one.

    Raises:
        RecipeError: with the settings that take the same steps on the GPUs there are.
    """
    workers = recipe.run.workers
    if workers == 1 or os.environ.get("RAY_ADDRESS"):
        return
    there = len(gpus.visible())
    if 0 < there < (recipe.run.min_workers or workers):
        gpus_here = "1 GPU" if there == 1 else f"{there} GPUs"
        raise RecipeError(
            f"run.workers: {workers} workers need a GPU each, and this machine has {gpus_here}; "
            f"set {same_steps(recipe, there)}, which keeps {recipe.global_batch_size} packs per "
            "step, or name a cluster that has them by RAY_ADDRESS"
        )


def same_steps(recipe: Recipe, most: int) -> str:
    """Return the settings for as many workers as possible, at most `most`, at the same steps."""
    passes = recipe.run.workers * recipe.train.accumulation
    workers = next(n for n in range(most, 0, -1) if passes % n == 0)
    return f"run.workers={workers} train.accumulation={passes // workers}"


def cpus_per_worker(workers: int, cores: float) -> float:
    """Return the cores that a worker asks Ray for: a part that all find, in Ray's ten thousandths.

    Args:
        workers: of the run.
        cores: that Ray has, of all nodes together; 0 where none has come yet.
    """
    if cores <= 0:
        return CPUS_PER_WORKER
    return min(CPUS_PER_WORKER, math.floor(cores / workers * 1e4) / 1e4)
