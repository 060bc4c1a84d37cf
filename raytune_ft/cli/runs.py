"""Verbs that run a recipe, or say what it would do: train, tune, inspect, plan."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from raytune_ft.cli.app import Config, DryRun, Json, Overrides, Recipe, Words, verb
from raytune_ft.errors import RecipeError

Resume = Annotated[
    str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run, exactly.")
]


@verb("train")
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    resume: Resume = None,
    as_json: Json = False,
) -> int:
    """Train a recipe."""
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    if resume is not None:
        if name is not None or overrides:
            raise RecipeError(
                "--resume: goes on with the run's own recipe; leave NAME and key=value out"
            )
        from raytune_ft.training.run_folder import RunFolder

        name = str(RunFolder.existing(resume).recipe)
    name = _named(name)
    if as_json and not dry_run:
        raise RecipeError("--json: prints the plan; add --dry-run")
    recipe = loader.load_recipe(name, overrides)
    if dry_run:
        from raytune_ft.inspection import print_plan

        return print_plan(recipe, as_json=as_json)
    from raytune_ft.train import train as run

    return run(recipe, source=name, resume=resume)


@verb("tune")
def tune(words: Words = None, config: Config = None, dry_run: DryRun = False) -> int:
    """Sweep over the fields in a recipe's `tune` section."""
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    name = _named(name)
    recipe = loader.load_recipe(name, overrides)
    from raytune_ft.tune import tune as run

    return run(recipe, source=name, dry_run=dry_run)


def split_words(words: list[str], config: str | None) -> tuple[str | None, list[str]]:
    """Tell the recipe's name from `key=value` words; RecipeError if it is there twice."""
    overrides = [word for word in words if re.match(r"[\w.]*=", word)]
    names = [word for word in words if word not in overrides]
    if config is not None:
        names.insert(0, config)
    if len(names) > 1:
        raise RecipeError(
            f"argument: '{names[1]}': the recipe is '{names[0]}' already; "
            "fields are set by key=value"
        )
    return (names[0] if names else None), overrides


def _named(name: str | None) -> str:
    if name is None:
        raise RecipeError("--config: name a recipe; start with --config quickstart.yaml")
    return name


@verb("inspect")
def inspect(
    config: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, and what is dropped."""
    from raytune_ft.config import loader

    recipe = loader.load_recipe(config, overrides or [])
    from raytune_ft.inspection import inspect_recipe

    inspect_recipe(recipe, rows)


@verb("plan")
def plan(
    config: Recipe,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="What there is, such as 8GiB.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Predict memory, steps and tokens, without weights and without a GPU."""
    from raytune_ft.config import loader

    recipe = loader.load_recipe(config, overrides or [])
    from raytune_ft.inspection import print_plan

    return print_plan(recipe, gpu_memory, as_json=as_json)
