"""Fetching: a run that is kept elsewhere in, its folder on this machine out.

Which of the two is further decides: a run that was killed before its last checkpoint was sent goes
on from that one on the machine that has it, and elsewhere from the newest whole one that was sent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft import durable
from raytune_ft.errors import CheckpointError
from raytune_ft.storing import steps
from raytune_ft.storing.places import (
    Folder,
    Place,
    is_elsewhere,
    local_copy,
    local_path,
    split_run,
)
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder

if TYPE_CHECKING:
    from raytune_ft.storing.mirror import Mirror

ADDRESS = ".address"
"""Beside the copies of a storage's runs: what the storage is called."""
RUN_JSON = "run.json"

Tell = Callable[[str], None]


def silent(_line: str) -> None:
    """Tell nobody."""


def told(name: str, line: str) -> None:
    """Tell the user, before anything else is on the screen."""
    print(f"{name}: {line}", file=sys.stderr)


def run_folder(
    path: str, *, to_train: bool = False, with_model: bool = False, tell: Tell = silent
) -> RunFolder:
    """Open a run by its path or address; fetch what of it is not here.

    Args:
        path: a run folder, or STORAGE/NAME elsewhere.
        to_train: its newest whole checkpoint as well.
        with_model: its base as well, where the recipe names it and it is not on this machine.
        tell: gets a line before what may take long, and for a checkpoint that is left out.

    Raises:
        CheckpointError: no such run, or it cannot be reached.
    """
    if not is_elsewhere(path):
        return RunFolder.existing(local_path(path))
    folder = copy_of(*split_run(path), to_train=to_train, tell=tell)
    if not folder.run_json.is_file():
        raise CheckpointError(f"{path}: no run is kept there; raytune-ft runs STORAGE lists them")
    if with_model and not Path(folder.info()["model_folder"]).is_dir():
        _find_model(folder)
    return folder


def _find_model(folder: RunFolder) -> None:
    """Write down where the base of a run that was trained elsewhere lies on this machine."""
    from raytune_ft.config.loader import load_recipe
    from raytune_ft.model.loading import prepare_folder  # a second of imports

    path = load_recipe(str(folder.recipe)).model.path
    folder.update(model_folder=str(prepare_folder(path)))


def copy_of(storage: str, name: str, *, to_train: bool = False, tell: Tell = silent) -> RunFolder:
    """Bring a run's copy here up to date; it may be empty where there is no such run yet.

    Raises:
        CheckpointError: the storage cannot be reached, or holds no whole copy.
    """
    place = Place(storage)
    place.check()
    folder = RunFolder(local_copy(storage, name))
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    (folder.path.parent / ADDRESS).write_text(place.address, encoding="utf-8")
    bring(place / name, folder, to_train=to_train, tell=tell)
    return folder


def shown_address(folder: RunFolder) -> str | None:
    """Return the address of a run of which this folder is a copy; None if it is none."""
    try:
        storage = (folder.path.parent / ADDRESS).read_text(encoding="utf-8")
    except OSError:
        return None
    return f"{storage}/{folder.path.name}"


def bring(place: Folder, folder: RunFolder, *, to_train: bool, tell: Tell) -> None:
    """Make a run's folder here what it is there, unless this one is further."""
    names = place.names()
    found = steps.steps_in(names)
    if RUN_JSON not in names or not _is_further(place, steps.last_whole(found), folder):
        return
    tell(f"fetching {len(names)} files")
    # run.json is the last one: a folder that has it has the others
    small = sorted(filter(steps.is_small, names), key=lambda name: (name == RUN_JSON, name))
    for name in small:
        target = folder.path / name
        half = target.with_name(f".{target.name}.half")
        place.fetch(name, half)
        half.replace(target)
    if to_train:
        fetch_steps(place, folder, [step for step, is_whole in found.items() if is_whole], tell)


def fetch_steps(place: Folder, folder: RunFolder, whole: list[str], tell: Tell) -> None:
    """Fetch the newest checkpoint that is as it was written, and the one with the best value."""
    from raytune_ft.training.saving import checkpoint  # a second of imports

    for step in reversed(whole):
        if fetch_step(place, folder, step, tell):
            best = checkpoint.read_state(folder.checkpoints / step).best_step
            if checkpoint.folder_name(best) in whole:
                fetch_step(place, folder, checkpoint.folder_name(best), tell)
            return


def fetch_step(place: Folder, folder: RunFolder, step: str, tell: Tell) -> bool:
    """Fetch a checkpoint whole; False, and a line, if it is not as it was written."""
    from raytune_ft.training.saving import checkpoint

    final = folder.checkpoints / step
    if final.is_dir() and checkpoint.damage(final) is None:
        return True
    try:
        with durable.whole_folder(final) as inside:
            for name in place.names(steps.name_of(step)):
                place.fetch(name, inside / name.rpartition("/")[2])
            if problem := checkpoint.damage(inside):
                raise _DamagedError(problem)
    except (_DamagedError, FileNotFoundError) as error:
        tell(f"{step}: {error or 'it went away'}; it is left out")
        return False
    return True


class _DamagedError(Exception):
    """What was fetched is not what was sent."""


def _is_further(place: Folder, there: int, folder: RunFolder) -> bool:
    """Tell whether a run is further elsewhere than its copy here."""
    if not folder.run_json.is_file():
        return True
    info = folder.info()
    if info.get("status") == "running" and liveness.is_here(info.get("driver") or {}):
        return False  # it is trained here just now
    here = steps.last_whole(steps.steps_here(folder.checkpoints))
    if here != there:
        return there > here
    theirs: dict[str, Any] = json.loads(place.read(RUN_JSON))
    if theirs.get("driver") == info.get("driver"):
        return not _drove_here(info)
    return theirs.get("status") == "done" and info.get("status") != "done"


def _drove_here(info: dict[str, Any]) -> bool:
    """Tell whether what stands here was written here, and not fetched."""
    driver = info.get("driver") or {}
    return liveness.is_here(driver) or liveness.is_gone(driver)


@contextmanager
def mirrored(run: RunFolder, keep: int) -> Iterator[Mirror | None]:
    """Keep a run at its address while the block runs; nothing to do if it is kept here.

    Raises:
        CheckpointError: behind the block, what could not be sent.
    """
    address = shown_address(run)
    if address is None:
        yield None
        return
    from raytune_ft.storing.mirror import Mirror  # a second of imports

    with Mirror(run, Place(address), address, keep) as mirror:
        yield mirror


def desks_of(run: RunFolder) -> list[Place]:
    """Return where the run's driver gives signs of life beside its folder here."""
    address = shown_address(run)
    return [Place(address)] if address is not None else []
