"""Fetching: a run that is kept elsewhere in, its folder on this machine out.

Which of the two is further decides: a run that was killed before its last checkpoint was sent goes
on from that one on the machine that has it, and elsewhere from the newest whole one that was sent.
Of a sweep the ledger tells that: it is read before the trials that it speaks of, which are there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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
TO_READ = ".to_read"
"""In the copy of a sweep: it lacks what only those need that go on with it."""
RESULTS = ("adapter", "model", "merged", "beginning")
"""Of a trial: what readers of its sweep do not need."""

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


def file_of(address: str) -> Path:
    """Fetch a file that stands in a store, as `s3://bucket/runs/NAME/best.yaml`.

    Raises:
        CheckpointError: there is none, or the store cannot be reached.
        RecipeError: it is no address in a store.
    """
    storage, name = split_run(address)
    place, here = Place(storage), local_copy(storage, name)
    place.check()
    try:
        place.fetch(name, here)
    except FileNotFoundError:
        raise CheckpointError(f"{address}: no such file there") from None
    return here


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


def bring(place: Place, folder: RunFolder, *, to_train: bool, tell: Tell) -> None:
    """Make a run's folder here what it is there, unless this one is further."""
    names = place.names()
    if RUN_JSON not in names:
        return
    if steps.LEDGER in names:
        _bring_sweep(place, folder, to_train=to_train, tell=tell)
    elif _is_further(place, steps.last_whole(steps.steps_in(names)), folder):
        tell(f"fetching {len(names)} files")
        _fetch_small(place, folder, names)
        if to_train:
            _fetch_newest(place, folder, names, tell)


def _bring_sweep(place: Place, folder: RunFolder, *, to_train: bool, tell: Tell) -> None:
    """Do that with a sweep; its record comes last, so a copy that has one has all the rest.

    Readers get no checkpoints and none of the trials' results, and a copy that says so.
    """
    theirs = steps.whole_lines(place.read(steps.LEDGER))
    if not _has_gone_on(place, theirs, folder, to_train=to_train):
        return
    names = place.names()  # whatever the ledger speaks of is among them
    found = {name.split("/")[1] for name in names if name.startswith(f"{steps.TRIALS}/")}
    tell(f"fetching a sweep of {len(found)} trials")
    durable.drop(folder.path)
    for trial in sorted(found):
        inside = f"{steps.TRIALS}/{trial}"
        own = [name.removeprefix(f"{inside}/") for name in names if name.startswith(f"{inside}/")]
        wanted = [name for name in own if to_train or name.split("/")[0] not in RESULTS]
        run = RunFolder(folder.path / inside)
        _fetch_small(place / inside, run, wanted)
        if to_train and run.run_json.is_file() and run.info().get("status") != "done":
            _fetch_newest(place / inside, run, own, tell)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not to_train:
        (folder.path / TO_READ).touch()
    (folder.path / steps.LEDGER).write_bytes(theirs)
    _fetch_small(place, folder, names)


def _fetch_small(place: Folder, folder: RunFolder, names: Iterable[str]) -> None:
    # run.json is the last one: a folder that has it has the others
    for name in sorted(filter(steps.is_small, names), key=lambda name: (name == RUN_JSON, name)):
        fetch_file(place, folder, name)


def _fetch_newest(place: Folder, folder: RunFolder, names: Iterable[str], tell: Tell) -> None:
    found = steps.steps_in(names)
    fetch_steps(place, folder, [step for step, is_whole in found.items() if is_whole], tell)


def fetch_file(place: Folder, folder: RunFolder, name: str) -> None:
    """Fetch a file of a run that is not a checkpoint's; it is there whole or not at all."""
    target = folder.path / name
    half = target.with_name(f".{target.name}.half_{os.getpid()}")
    place.fetch(name, half)
    half.replace(target)


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


def _is_further(place: Place, there: int, folder: RunFolder) -> bool:
    """Tell whether a run is further elsewhere than its copy here."""
    if not folder.run_json.is_file():
        return True
    if _is_trained_here(folder):
        return False
    here = steps.last_whole(steps.steps_here(folder.checkpoints))
    return there > here if here != there else _is_later(place, folder)


def _has_gone_on(place: Place, theirs: bytes, folder: RunFolder, *, to_train: bool) -> bool:
    """Tell the same of a sweep, by its ledgers: of two that part, the copy's was left behind."""
    if not folder.run_json.is_file():
        return True
    if (folder.path / TO_READ).is_file() and to_train:
        return True
    if _is_trained_here(folder):
        return False
    ours = steps.whole_lines((folder.path / steps.LEDGER).read_bytes())
    return not ours.startswith(theirs) if ours != theirs else _is_later(place, folder)


def _is_trained_here(folder: RunFolder) -> bool:
    """Tell whether a run is trained on this machine just now."""
    info = folder.info()
    return info.get("status") == "running" and liveness.is_here(info.get("driver") or {})


def _is_later(place: Place, folder: RunFolder) -> bool:
    """Tell whether a run, as far here as there, was worked on there since."""
    info = folder.info()
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
