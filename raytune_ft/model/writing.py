"""Writing: folders for other tools, there whole or not at all, with room for them on the disk.

What a killed process left of the same folder is removed by the next one that writes it; one that
is still being written is held by a lock, which ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft import durable
from raytune_ft.errors import RecipeError

SPARE_BYTES = 64 << 20
"""For side files, and for the file system's own needs."""
GIB = 2**30


@contextmanager
def new_folder(out: Path, needed: int = 0, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` behind the block, on disk.

    Args:
        out: must not exist or be empty, unless `replace` says so.
        needed: bytes that will be written.
        replace: what is there is kept until the new folder is whole, and removed then.

    Raises:
        RecipeError: `out` is not empty or is being written, the disk is too full, or the system
            refuses.
    """
    if not replace:
        check_free(out)
    _check_alone(out)
    check_room(out, needed)
    try:
        with durable.whole_folder(out) as folder, _held(folder):
            yield folder
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(
            f"{error.filename or out}: cannot be written ({reason}); nothing is left of {out}"
        ) from None


def check_free(out: Path) -> None:
    """Refuse a target that holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: exists and is not empty; name a new folder")


def check_room(out: Path, needed: int) -> None:
    """Refuse what does not fit onto the disk of `out`."""
    place = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free, wanted = shutil.disk_usage(place).free, needed + SPARE_BYTES
    if needed and free < wanted:
        raise RecipeError(
            f"{out}: needs {wanted / GIB:.1f} GiB, and its disk has {free / GIB:.1f} GiB free; "
            "name a folder on another one, or free some"
        )


def _check_alone(out: Path) -> None:
    for left in out.parent.glob(f"{durable.WRITING}{out.name}_*"):
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"{out}: is being written by another process; wait for it, or name another folder"
            ) from None
        finally:
            os.close(descriptor)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder: a lock ends with its process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
