"""New run: a recipe in, its empty folder out, which goes again if nothing comes of the run.

Apart from what a run needs besides, since this is asked before seconds of imports.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import STARTING, RunFolder, read_json, write_json


def new_folder(recipe: Recipe, source: str) -> RunFolder:
    """Make an empty folder for a new run; RecipeError if that run exists.

    One in which a driver was killed before its run began is taken over.
    """
    now = datetime.now().astimezone()
    name = recipe.run.name or f"{loader.recipe_stem(source)}_{now:%Y%m%d_%H%M%S}"
    path = Path(recipe.run.storage).expanduser().resolve() / name
    if path.exists() and not _never_began(path):
        raise RecipeError(
            f"run.name: '{path}' exists; go on with it by --resume {path}, or choose another name"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / STARTING, liveness.this_process())
    except OSError as error:
        raise RecipeError(f"run.storage: '{path}' cannot be made: {error.strerror}") from None
    return RunFolder(path)


def _never_began(path: Path) -> bool:
    if not (path / STARTING).is_file():
        return False
    return liveness.is_gone(read_json(path / STARTING))


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
