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


DeepSpeed = Annotated[
    str | None, typer.Option("--deepspeed", help="Short for train.deepspeed=: a preset or a file.")
]
WorkDir = Annotated[
    str | None, typer.Option("--work-dir", help="Short for run.storage=, run.name=: the folder.")
]
ConfigOptions = Annotated[
    list[str] | None,
    typer.Option("--cfg-options", metavar="KEY=VALUE", help="Fields by XTuner's names."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Short for train.seed=.")]
Launcher = Annotated[str, typer.Option("--launcher", hidden=True)]
LocalRank = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


@verb("train")
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    resume: Resume = None,
    as_json: Json = False,
    deepspeed: DeepSpeed = None,
    work_dir: WorkDir = None,
    cfg_options: ConfigOptions = None,
    seed: Seed = None,
    launcher: Launcher = "none",
    local_rank: LocalRank = 0,
) -> int:
    """Train a recipe."""
    from raytune_ft.cli import spelling
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    if cfg_options:
        overrides = spelling.config_words([*cfg_options, *overrides])
    overrides += spelling.train_words(
        deepspeed=deepspeed, work_dir=work_dir, seed=seed, launcher=launcher, local_rank=local_rank
    )
    if resume is not None:
        resume = spelling.run_of(resume)
        name, overrides = _resumed(resume, name, overrides)
    name = _named(name)
    if as_json and not dry_run:
        raise RecipeError("--json: prints the plan; add --dry-run")
    recipe = loader.load_recipe(_file_of(name), overrides)
    if dry_run:
        from raytune_ft.planning import print_plan

        return print_plan(recipe, as_json=as_json)
    from raytune_ft.train import train as run

    return run(recipe, source=name, resume=resume)


def _resumed(run: str, name: str | None, overrides: list[str]) -> tuple[str, list[str]]:
    """Return the recipe of the run to go on with, and what is changed in it.

    A recipe that is named must be the run's own; without one, fields may change that decide no
    number of the run.
    """
    from raytune_ft.cli import spelling
    from raytune_ft.config import loader
    from raytune_ft.storing import fetching

    recipe = str(fetching.run_folder(run).recipe)
    if name is not None:
        asked = loader.load_recipe(name, overrides)
        spelling.check_same(name, asked, loader.load_recipe(recipe), run)
        return recipe, []
    if overrides:
        from raytune_ft.training.saving import identity

        for word in overrides:
            identity.check_field(word.partition("=")[0], run)
        asked = loader.load_recipe(recipe, overrides)
        identity.check_batch(loader.load_recipe(recipe).global_batch_size, asked, run)
    return recipe, overrides


@verb("tune")
def tune(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="SWEEP", help="Go on with this sweep, exactly."),
    ] = None,
) -> int:
    """Sweep over the fields in a recipe's `tune` section."""
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    if resume is not None:
        from raytune_ft.storing import fetching

        name = name or str(fetching.run_folder(resume).recipe)
    name = _named(name)
    recipe = loader.load_recipe(_file_of(name), overrides)
    from raytune_ft.tune import tune as run

    if as_json and not dry_run:
        raise RecipeError("--json: prints the plan; add --dry-run")
    return run(recipe, source=name, dry_run=dry_run, as_json=as_json, resume=resume)


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


def _file_of(name: str) -> str:
    """Return a recipe's name or file; one in a store, as a sweep's best.yaml, is fetched."""
    if re.match(r"(s3|gs)://", name) is None:
        return name
    from raytune_ft.storing import fetching

    return str(fetching.file_of(name))


@verb("inspect")
def inspect(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A recipe, or a data file, folder, glob or address."),
    ],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows of each source.")] = 3,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")
    ] = None,
) -> None:
    """Show rows as the model will see them, packs, lengths, and what is dropped."""
    from raytune_ft import inspection

    inspection.inspect(config, overrides or [], rows, html)


@verb("plan")
def plan(
    config: Recipe,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="What there is, such as 8GiB.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Which GPU, such as h200.")] = None,
    as_json: Json = False,
) -> int:
    """Predict memory, time, steps and tokens, and propose the fastest settings that fit."""
    from raytune_ft.config import loader

    recipe = loader.load_recipe(config, overrides or [])
    from raytune_ft.planning import print_plan

    source = " ".join([config, *(overrides or [])])
    return print_plan(recipe, gpu_memory, gpu, source=source, as_json=as_json)
