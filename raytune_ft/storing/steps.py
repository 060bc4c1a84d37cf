"""Steps: the checkpoints among the files of a run that is kept elsewhere.

A checkpoint is there when its manifest is, which is sent last and deleted first. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from raytune_ft.storing.places import Folder
from raytune_ft.training.guarding.attending import ALIVE, REQUEST
from raytune_ft.training.run_folder import MANIFEST, STEP_PREFIX

CHECKPOINTS = "checkpoints"
LEDGER, TRIALS = "trials.jsonl", "trials"
"""Of a sweep: what became of its trials, and their run folders."""
LEFT_OUT = frozenset({CHECKPOINTS, LEDGER, TRIALS, "ray", ALIVE, REQUEST})
"""At the top of a run: handled apart, of this machine alone, or of one driver alone."""


def name_of(step: str) -> str:
    """Return the name, as files have it, of a checkpoint's folder."""
    return f"{CHECKPOINTS}/{step}"


def steps_in(names: Iterable[str]) -> dict[str, bool]:
    """Return checkpoints, oldest first, and of each whether it is whole."""
    found: dict[str, bool] = {}
    for name in names:
        top, *rest = PurePosixPath(name).parts
        step = rest[0] if rest else ""
        if top == CHECKPOINTS and step[len(STEP_PREFIX) :].isdigit() and len(rest) == 2:
            found[step] = found.get(step, False) or rest[1] == MANIFEST
    return dict(sorted(found.items(), key=lambda entry: number_of(entry[0])))


def last_whole(steps: dict[str, bool]) -> int:
    """Return the optimizer step of the newest whole checkpoint; 0: there is none."""
    return max((number_of(step) for step, is_whole in steps.items() if is_whole), default=0)


def steps_here(folder: Path) -> dict[str, bool]:
    """Return the same of a run's folder of checkpoints on this machine."""
    found = folder.glob(f"{STEP_PREFIX}*/*") if folder.is_dir() else []
    return steps_in(path.relative_to(folder.parent).as_posix() for path in found)


def number_of(step: str) -> int:
    """Return the optimizer step that a checkpoint's name tells."""
    return int(step.removeprefix(STEP_PREFIX))


def is_small(name: str) -> bool:
    """Tell whether a file is one of those beside the checkpoints that go along."""
    parts = PurePosixPath(name).parts
    return parts[0] not in LEFT_OUT and not any(part.startswith(".") for part in parts)


def whole_lines(content: bytes) -> bytes:
    """Return what a ledger says but for a last line that is being written."""
    return content[: content.rfind(b"\n") + 1]


def drop(place: Folder, step: str) -> None:
    """Delete a checkpoint so that no part of it is ever taken for the whole."""
    place.delete(f"{name_of(step)}/{MANIFEST}")
    place.delete(name_of(step))
