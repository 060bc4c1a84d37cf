"""New run: a recipe in, its folder out: an empty one, or that of the run to go on with.

Apart from what a run needs besides, since this is asked before seconds of imports. A folder of
which nothing comes goes again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.resume import open_run, shown
from raytune_ft.storing import fetching, places
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import STARTING, RunFolder, read_json, write_json


@dataclass(frozen=True)
class Opened:
    """A run that can be carried out."""

    folder: RunFolder
    goes_on: bool
    """Whether it began before."""


def open_or_make(recipe: Recipe, source: str, resume: str | None) -> Opened | None:
    """Open the run that is meant; None, and a line on stderr, if it is finished.

    Args:
        recipe: to train.
        source: what the user called the recipe, for the name of a run that has none.
        resume: the run to go on with, by its folder or address. Without one, a run of this name
            in this storage is gone on with if it is of the same recipe: a job that a cluster
            starts again does what it did before.

    Raises:
        RecipeError: a run of that name is of another recipe; names the first field that differs.
        CheckpointError: a process trains it just now, or its storage cannot be used.
    """
    if resume is not None:
        folder = open_run(resume, recipe)
        return Opened(folder, goes_on=True) if folder else None
    folder = _place_of(recipe, source)
    if not folder.run_json.is_file():
        _begin(folder)
        return Opened(folder, goes_on=False)
    _check_same(recipe, folder)
    opened = open_run(fetching.shown_address(folder) or str(folder.path), recipe)
    if opened is None:
        return None
    print(f"{shown(folder)}: goes on with this run, which began before", file=sys.stderr)
    return Opened(opened, goes_on=True)


def new_folder(recipe: Recipe, source: str) -> RunFolder:
    """Make an empty folder here, as a sweep's; RecipeError if it exists.

    One in which a driver was killed before its run began is taken over.
    """
    folder = _place_of(recipe, source)
    if folder.run_json.is_file():
        raise RecipeError(
            f"run.name: '{shown(folder)}' exists; go on with it by --resume {shown(folder)}, or "
            "choose another name"
        )
    _begin(folder)
    return folder


def _place_of(recipe: Recipe, source: str) -> RunFolder:
    """Return where the run stands on this machine, with what of it was elsewhere."""
    now = datetime.now().astimezone()
    name = recipe.run.name or f"{loader.recipe_stem(source)}_{now:%Y%m%d_%H%M%S}"
    if not places.is_elsewhere(recipe.run.storage):
        return RunFolder(places.local_path(recipe.run.storage) / name)
    return fetching.copy_of(
        recipe.run.storage, name, to_train=True, tell=lambda line: fetching.told(name, line)
    )


def _begin(folder: RunFolder) -> None:
    path = folder.path
    if path.exists() and not _never_began(path):
        raise RecipeError(
            f"run.name: '{path}' exists and is no run (it has no run.json); choose another name"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / STARTING, liveness.this_process())
    except OSError as error:
        raise RecipeError(f"run.storage: '{path}' cannot be made: {error.strerror}") from None


def _never_began(path: Path) -> bool:
    if not (path / STARTING).is_file():
        return False
    return liveness.is_gone(read_json(path / STARTING))


def _check_same(recipe: Recipe, folder: RunFolder) -> None:
    from raytune_ft.training.saving import identity  # a second of imports

    began_with = loader.load_recipe(str(folder.recipe))
    identity.check_batch(began_with.global_batch_size, recipe, shown(folder))
    if found := identity.difference(recipe, began_with):
        field, ours, theirs = found
        raise RecipeError(
            f"run.name: {shown(folder)} began with {field} {theirs}, this recipe has {ours}; train "
            "this one under another run.name"
        )


@contextmanager
def removed_unless_started(folder: RunFolder) -> Iterator[None]:
    """Leave nothing behind when a run ends before it began to write its record."""
    try:
        yield
    except BaseException:
        if not folder.run_json.is_file():
            shutil.rmtree(folder.path, ignore_errors=True)
            if folder.path.parent.is_dir() and not any(folder.path.parent.iterdir()):
                folder.path.parent.rmdir()
        raise
