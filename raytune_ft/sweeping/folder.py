"""Folder: a new sweep's, or that of one that goes on; and how a sweep goes on that was cut short.

SWEEP/trials.jsonl    the ledger; a folder without one is no sweep
SWEEP/trials/NAME/    a run folder for each trial
SWEEP/best.yaml       recipe of the best trial; best/: its adapter, or its model
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, Interrupted, RaytuneError, RecipeError, TrainingError
from raytune_ft.new_run import new_folder
from raytune_ft.resume import open_run, shown
from raytune_ft.storing import fetching
from raytune_ft.storing.fetching import told
from raytune_ft.storing.places import Place, is_elsewhere, local_path
from raytune_ft.sweeping import trials
from raytune_ft.training.run_folder import RunFolder

if TYPE_CHECKING:
    from raytune_ft.sweeping.sending import SweepMirror

BEST_RECIPE = "best.yaml"
BEST = "best"
FREE = ("run.", "tune.concurrent", "data.cache")
"""Fields that may be others when a sweep goes on; all others decide what it finds."""


def open_sweep(recipe: Recipe, source: str, resume: str | None) -> RunFolder | None:
    """Open the sweep's folder; None, and a line on stderr, if the sweep is finished.

    Args:
        recipe: of the sweep; with `resume` that sweep's own.
        source: what the user called the recipe.
        resume: folder or address of the sweep to go on with. Without one, a sweep of this name is
            gone on with if it has the same recipe.

    Raises:
        RecipeError: a sweep of that name has another recipe.
        CheckpointError: it is no sweep, or a process works on it just now.
    """
    folder = _resumed(resume) if resume else _named(recipe)
    is_sweep = folder is not None and (folder.path / trials.FILE).is_file()
    if resume and not is_sweep:
        raise CheckpointError(
            f"{resume}: is no sweep (it has no {trials.FILE}); go on with a run by: "
            f"raytune-ft train --resume {resume}"
        )
    if folder is None or not is_sweep or not folder.run_json.is_file():
        folder = new_folder(recipe, source)  # takes over what a killed driver had not begun
        (folder.path / trials.FILE).touch()
        return folder
    check_same(recipe, folder)
    if (folder.path / BEST_RECIPE).is_file() and folder.info().get("status") == "done":
        print(
            f"{shown(folder)}: this sweep is finished; its best recipe is "
            f"{shown(folder)}/{BEST_RECIPE}, its adapter {shown(folder)}/{BEST}",
            file=sys.stderr,
        )
        return None
    open_run(fetching.shown_address(folder) or str(folder.path), recipe)
    print(f"{shown(folder)}: goes on with this sweep, which began before", file=sys.stderr)
    return folder


def _resumed(resume: str) -> RunFolder:
    address = resume if is_elsewhere(resume) else fetching.shown_address(RunFolder(resume))
    if address is None:
        return RunFolder(local_path(resume))
    return fetching.run_folder(address, to_train=True, tell=lambda line: told(address, line))


def _named(recipe: Recipe) -> RunFolder | None:
    name, storage = recipe.run.name, recipe.run.storage
    if name is None:
        return None
    if not is_elsewhere(storage):
        return RunFolder(local_path(storage) / name)
    return fetching.copy_of(storage, name, to_train=True, tell=lambda line: told(name, line))


def check_same(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to go on with another recipe than the sweep began with."""
    theirs = _fields(loader.load_recipe(str(folder.recipe)))
    ours = _fields(recipe)
    for field in sorted(ours.keys() | theirs.keys()):
        if not field.startswith(FREE) and ours.get(field) != theirs.get(field):
            raise RecipeError(
                f"run.name: {shown(folder)} began with {field} {theirs.get(field)}, this recipe "
                f"has {ours.get(field)}; sweep with this one under another run.name"
            )


def _fields(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json")
    return {f"{s}.{field}": value for s, each in content.items() for field, value in each.items()}


def go_on_line(folder: RunFolder) -> str:
    """Tell how to go on with a sweep."""
    return f"go on with: raytune-ft tune --resume {shown(folder)}"


def unheard(folder: RunFolder) -> str:
    """Tell how to go on with a sweep whose driver ended without a word."""
    on = go_on_line(folder) if folder.run_json.is_file() else "start the sweep again"
    return f"error: {shown(folder)}: its driver was killed, or Ray was lost; {on}"


@contextmanager
def mirrored(folder: RunFolder, keep: int) -> Iterator[SweepMirror | None]:
    """Keep a sweep at its address while the block runs; nothing to do if it is kept here.

    Args:
        folder: of the sweep.
        keep: `checkpoint.keep` of its trials.

    Raises:
        CheckpointError: behind the block, what could not be sent.
    """
    address = fetching.shown_address(folder)
    if address is None:
        yield None
        return
    from raytune_ft.sweeping.sending import SweepMirror  # a second of imports

    mirror = SweepMirror(folder, Place(address), keep)
    with mirror:
        yield mirror


@contextmanager
def kept_state(folder: RunFolder) -> Iterator[None]:
    """Write down how the sweep ended, and say how to go on where Ray itself was lost.

    Raises:
        Interrupted: Ray was lost under a sweep that had begun, or a signal asked for the end.
        TrainingError: Ray was lost before it had.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except Interrupted:
        _update(folder, "stopped")
        raise
    except RayError as error:
        if isinstance(error, RaytuneError | RayTaskError):
            _update(folder, "failed")
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not folder.run_json.is_file():
            raise TrainingError(f"Ray was lost ({reason}); start the sweep again") from None
        _update(folder, "interrupted")
        raise Interrupted(
            f"{shown(folder)}: Ray was lost ({reason}); {go_on_line(folder)}"
        ) from None
    except RaytuneError:
        _update(folder, "failed")
        raise


def _update(folder: RunFolder, status: str) -> None:
    if folder.run_json.is_file():
        folder.update(status=status)
