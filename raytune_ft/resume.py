"""Resume: which run `--resume RUN` may go on with, and how one ends whose Ray was lost.

A killed driver says nothing; what its run is then, the process in its record tells. A killed raylet
or head node ends the driver, which says how to go on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, Interrupted, RaytuneError, TrainingError
from raytune_ft.storing import fetching, places
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder

LISTENS_S = 2.5 * liveness.BEAT_S
"""For a sign of life of a driver on another machine."""
LOOK_S = 1.0


def open_run(path: str, recipe: Recipe) -> RunFolder | None:
    """Open a run to go on with; None, and a line on stderr, if there is nothing to go on with.

    Args:
        path: the run, as the user wrote it; its address, where it is kept elsewhere.
        recipe: to go on with; another `eval` section may let a finished run go on, or export
            another of its checkpoints.

    Raises:
        CheckpointError: it is no run folder, or a driver trains it just now.
    """
    folder = fetching.run_folder(path, to_train=True, tell=lambda line: fetching.told(path, line))
    info, status = folder.info(), folder.status()
    result = next((p for p in (folder.adapter, folder.model) if p.is_dir()), None)
    finished = status == "done" and (folder.path / "report.html").is_file()
    if finished and result and recipe.eval == loader.load_recipe(str(folder.recipe)).eval:
        print(
            f"{path}: this run is finished, its result is {result}; to train on from there, begin "
            f"another one with model.load_from={path}",
            file=sys.stderr,
        )
        return None
    driver = info.get("driver") or {}
    if status == "running" and liveness.is_here(driver):
        raise CheckpointError(
            f"{path}: process {driver['pid']} trains this run; wait until it ends, or end it"
        )
    if status == "running":
        _listen(path, folder, driver)
    return folder


def _listen(path: str, folder: RunFolder, driver: dict[str, Any]) -> None:
    """Refuse a run whose driver, on another machine, gives a sign of life; it takes a while."""
    first = _sign(path, folder)
    if not isinstance(first, dict) or first.get("driver") != driver:
        return
    if liveness.is_gone(driver) or liveness.is_silent(driver, first):
        return
    print(
        f"{path}: its record says that a process on {driver.get('host')} trains it; listening for "
        f"{LISTENS_S:g} s whether it does",
        file=sys.stderr,
    )
    deadline = time.monotonic() + LISTENS_S
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        now = _sign(path, folder)
        if now is None:  # it has ended meanwhile
            return
        if now != first:
            raise CheckpointError(
                f"{path}: process {driver.get('pid')} on {driver.get('host')} trains this run; "
                "wait until it ends, or end it by raytune-ft stop"
            )


def _sign(path: str, folder: RunFolder) -> Any:
    """Read the last sign of life of a run's driver, where the run is kept; None: it has ended."""
    if not places.is_elsewhere(path):
        return folder.alive()
    with suppress(FileNotFoundError):
        sign = places.Place(path).read(liveness.ALIVE)
        try:
            return json.loads(sign)
        except ValueError:  # somebody writes it just now
            return sign
    return None


@contextmanager
def resumable(folder: RunFolder, shown: str) -> Iterator[None]:
    """Say in one line how to go on where Ray itself is lost while the block runs.

    Args:
        folder: of the run.
        shown: its path as a person would type it.

    Raises:
        Interrupted: Ray was lost under a run that had begun.
        TrainingError: before it had.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayError as error:
        if isinstance(error, RaytuneError | RayTaskError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise lost(folder, shown, reason) from None


def lost(folder: RunFolder, shown: str, reason: str) -> RaytuneError:
    """Note that a run's Ray was lost; return what to tell, as `resumable` raises it."""
    if not folder.run_json.is_file():
        return TrainingError(f"Ray was lost ({reason}); start the run again")
    folder.update(status="interrupted")
    return Interrupted(
        f"{shown}: Ray was lost ({reason}); go on with: raytune-ft train --resume {shown}"
    )


def unheard(folder: RunFolder) -> str:
    """Tell how to go on with a run whose driver ended without a word."""
    run = shown(folder)
    on = f"go on with: raytune-ft train --resume {run}"
    if not folder.run_json.is_file():
        on = "start the run again"
    return f"error: {run}: its driver was killed, or Ray was lost; {on}"


def shown(folder: RunFolder) -> str:
    """Write a path as a person would type it here, or the address of a run kept elsewhere."""
    if (address := fetching.shown_address(folder)) is not None:
        return address
    path = os.path.relpath(folder.path)
    return str(folder.path) if path.startswith("..") else path
