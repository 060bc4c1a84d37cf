"""Checks: a sweep's recipe in, one line out where it cannot give what it promises."""

from __future__ import annotations

from raytune_ft.config.pairs import measured
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping import population
from raytune_ft.sweeping.searching import search_for


def check(recipe: Recipe) -> None:
    """Refuse a sweep that cannot run, before anything starts; RecipeError says why."""
    if recipe.run.workers > 1:
        raise RecipeError("run.workers: a sweep trains one worker per trial; set run.workers: 1")
    metric, mode = recipe.tune.metric, recipe.tune.mode
    ends = {"loss": "min", **measured(recipe)}
    if metric not in ends:
        raise RecipeError(
            f"tune.metric: '{metric}' is not measured; choose {', '.join(sorted(ends))}, or name "
            "it in eval.metrics"
        )
    if metric != "loss" and recipe.data.validation is None:
        raise RecipeError(f"tune.metric: '{metric}' needs held-out rows; set data.validation")
    if mode != ends[metric]:
        raise RecipeError(
            f"tune.mode: '{mode}' would look for the worst {metric}; set tune.mode: {ends[metric]}"
        )
    search_for(recipe)
    if recipe.tune.scheduler == "pbt":
        population.check(recipe)
