"""Seen: what a person calls a run in, its files and its state out, wherever it is kept.

A run's state is honest: `running` only while somebody drives it (`guarding.attending`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.errors import CheckpointError
from raytune_ft.storing.places import Place, is_elsewhere, local_path, split_run
from raytune_ft.training.guarding import liveness
from raytune_ft.training.guarding.attending import Desk, Here
from raytune_ft.training.run_folder import Event, RunFolder

STORAGE = "runs"
TRIALS = "trials"
"""Folder of a sweep that has a run folder for each trial."""
LEDGER = "trials.jsonl"
"""Of a sweep alone."""
SIGNS = ("run.json", "metrics.jsonl", "lines.log", liveness.ALIVE)
"""What makes a folder a run, a damaged or a starting one as well."""


class Files(Desk, Protocol):
    """A run's files by their names; a `Place` of the run's own folder is one."""

    def stamp(self, name: str) -> tuple[int, float] | None:
        """Return a file's bytes and the second since 1970 of its change; None: not there."""

    def part(self, name: str, start: int, size: int) -> bytes:
        """Return up to `size` bytes of a file from `start` on; FileNotFoundError without one."""


class FilesHere(Here):
    """A run folder of this machine."""

    def stamp(self, name: str) -> tuple[int, float] | None:
        try:
            found = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size, found.st_mtime

    def part(self, name: str, start: int, size: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass(frozen=True)
class Seen:
    """A run, as a person called it."""

    shown: str
    """Its path or address, to be typed again."""
    files: Files
    is_elsewhere: bool

    def info(self) -> Event:
        """Read run.json; an empty object where it is missing or damaged."""
        return read_object(self.files, "run.json")

    def is_there(self) -> bool:
        """Tell whether there is anything of a run by now."""
        return any(self.files.stamp(name) is not None for name in SIGNS)

    def driver(self) -> dict[str, Any] | None:
        """Return the process that drives it now; None if none does.

        One that has just begun stands in no run.json yet.
        """
        return driver_of(self.info(), read_object(self.files, liveness.ALIVE))

    def status(self) -> str:
        """Return `running`, `done` and the like, as `status_of` tells it."""
        return status_of(self.info(), read_object(self.files, liveness.ALIVE))

    def how_to_go_on(self) -> str:
        """Say which command takes it up again."""
        verb = "tune" if self.files.stamp(LEDGER) is not None else "train"
        return f"go on with: raytune-ft {verb} --resume {self.shown}"


def status_of(info: Event, alive: Event) -> str:
    """Return a run's status; `interrupted` if nobody drives it who should, `damaged` if unknown.

    Args:
        info: its run.json.
        alive: its driver's last sign of life.
    """
    said = info.get("status")
    if not isinstance(said, str):
        return "damaged"
    driver = info.get("driver") or {}
    try:
        gone = liveness.is_gone(driver) or liveness.is_silent(driver, alive)
    except (AttributeError, KeyError, TypeError, ValueError):
        return "damaged"
    return "interrupted" if said == "running" and gone else said


def driver_of(info: Event, alive: Event) -> dict[str, Any] | None:
    """Return the process that drives a run now, or that may; None if none does."""
    try:
        if (found := liveness.at_work(alive)) is not None:
            return found
    except (KeyError, TypeError, ValueError):
        return None
    return info.get("driver") or {} if status_of(info, alive) == "running" else None


def find(word: str) -> Seen:
    """Return a run by its path, its address, its name under runs/, or as `SWEEP/TRIAL`.

    Raises:
        CheckpointError: there is none.
    """
    seen = look_at(word)
    if not seen.is_there():
        raise CheckpointError(f"{word}: no run there, nor under {STORAGE}/; raytune-ft runs lists")
    return seen


def look_at(word: str) -> Seen:
    """Return a run, or where it would be if it is still to come."""
    if is_elsewhere(word):
        storage, name = split_run(word)
        return Seen(f"{storage}/{name}", Place(storage) / name, is_elsewhere=True)
    path = Path(word.removeprefix("file://")).expanduser()
    places = [path, Path(STORAGE) / path]
    for place in [*places, *(one.parent / TRIALS / one.name for one in places)]:
        if any((place / name).is_file() for name in SIGNS):
            return Seen(str(place), FilesHere(RunFolder(place)), is_elsewhere=False)
    bare = path.name == word and not path.is_dir()
    place = Path(STORAGE) / path if bare else local_path(word)
    return Seen(str(place) if bare else word, FilesHere(RunFolder(place)), is_elsewhere=False)


def read_object(files: Files, name: str) -> Event:
    """Read a JSON object; an empty one where it is missing or damaged."""
    try:
        content = json.loads(files.read(name))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
