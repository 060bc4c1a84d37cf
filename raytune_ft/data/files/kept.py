"""Kept files: copies that can be made again, in the cache folder, complete or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from raytune_ft.config.cache import cache_dir
from raytune_ft.errors import DataError

RESERVE_BYTES = 2**30
"""Left free on the disk, whatever is fetched or unpacked."""


def kept_file(
    what: tuple[str, ...], name: str, make: Callable[[Path], None], *, again: bool = False
) -> Path:
    """Return the copy of something, made if it is not there.

    Args:
        what: decides the folder; another version of the same thing is another copy.
        name: file name, kept so that its suffix tells the format.
        make: writes the copy to the path given; what it raises leaves nothing behind.
        again: make it even if it is there.
    """
    key = hashlib.sha256("\0".join(what).encode()).hexdigest()[:32]
    folder = cache_dir() / "data" / key
    target = folder / name
    if target.is_file() and not again:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
    os.close(handle)
    try:
        make(Path(partial))
        with Path(partial).open("rb") as file:
            os.fsync(file.fileno())
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def check_room(size_bytes: int, display: str) -> None:
    """Raise DataError if so much more does not fit into the cache folder's disk."""
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free - size_bytes < RESERVE_BYTES:
        raise DataError(
            f"{display}: needs {max(size_bytes, 1) / 2**30:.2f} GiB more, and {folder} has "
            f"{free / 2**30:.1f} GiB free; make room, or set RAYTUNE_CACHE to another disk"
        )
