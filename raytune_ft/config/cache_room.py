"""Room: how much a part of the cache folder may take, and what goes when that is full.

A part, such as `tokens`, holds a folder for each key. Those used longest ago go first; a folder
goes as a whole, by another name, so that nobody writes into what is being removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from raytune_ft.errors import RecipeError

DEFAULT_GIB, DEFAULT_SHARE = 50, 0.2
"""A part's room without its variable: so many GiB, or this share of the disk if that is less."""
RESERVE_BYTES = 2**30
"""Left free on the disk, whatever is kept."""
PARTIAL, REMOVED = ".partial-", ".removed-"
"""Beginnings of the names of files that are being written, and of folders that are removed."""
PARTIAL_S = 3600
"""Seconds after which a file that is being written is taken for a killed process's."""


def limit_bytes(part: Path, variable: str) -> int:
    """Return how much all keys of a part may take together.

    Args:
        part: its folder, there or not.
        variable: environment variable that sets it in GiB.

    Raises:
        RecipeError: the variable is no number of GiB.
    """
    chosen = os.environ.get(variable)
    if not chosen:
        total = shutil.disk_usage(_existing(part)).total
        return int(min(DEFAULT_GIB * 2**30, DEFAULT_SHARE * total))
    try:
        gib = float(chosen)
        if not 0 <= gib < 2**30:
            raise ValueError
    except ValueError:
        text = f"{variable}: '{chosen}' is no number of GiB; write one, as in 50"
        raise RecipeError(text) from None
    return int(gib * 2**30)


def free_bytes(part: Path) -> int:
    """Return what may still be written to a part's disk; negative if that is too full already."""
    return shutil.disk_usage(_existing(part)).free - RESERVE_BYTES


def shrink(part: Path, key: str, limit: int) -> int:
    """Remove other keys until all are within the limit; return what is left, in bytes."""
    sizes = {folder: _size_of(folder) for folder in part.iterdir() if folder.is_dir()}
    total = sum(sizes.values())
    others = [folder for folder in sizes if folder.name != key]
    for folder in sorted(others, key=_last_use):
        if total <= limit and not folder.name.startswith(REMOVED):
            continue
        remove(folder)
        total -= sizes[folder]
    return total


def remove(folder: Path) -> None:
    """Take a key away as a whole; not at any price."""
    with suppress(OSError):
        if not folder.name.startswith(REMOVED):
            folder = folder.rename(folder.with_name(f"{REMOVED}{folder.name[:16]}-{os.getpid()}"))
        shutil.rmtree(folder, ignore_errors=True)


def _size_of(folder: Path) -> int:
    """Return what a key takes on disk, in bytes; removes what killed writers left."""
    total = 0
    for entry in _entries(folder):
        with suppress(FileNotFoundError):
            found = entry.stat(follow_symlinks=False)
            if entry.name.startswith(PARTIAL) and found.st_mtime < time.time() - PARTIAL_S:
                Path(entry.path).unlink(missing_ok=True)
                continue
            total += found.st_size
    return total


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
