"""Kept files: copies and numbers that can be made again, in the cache folder, or not there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.cache import cache_dir
from raytune_ft.config.cache_room import RESERVE_BYTES
from raytune_ft.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]


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
    folder = _folder(what)
    target = folder / name
    if target.is_file() and not again:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not target.is_file() or again:
            _make(target, make)
    return target


def _make(target: Path, make: Callable[[Path], None]) -> None:
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=target.parent)
    os.close(handle)
    try:
        make(Path(partial))
        with Path(partial).open("rb") as file:
            os.fsync(file.fileno())
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine make a copy, and others wait for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # where a file system knows no locks the copy is made twice, and is as good
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def kept_arrays(what: tuple[str, ...], make: Callable[[], Arrays]) -> Arrays:
    """Return arrays of numbers, made if they are not there or are damaged.

    Where nothing can be written they are made each time: they only save time.

    Args:
        what: decides the file, as for `kept_file`.
        make: computes them.
    """
    name = "numbers.npz"
    try:
        return _loaded((_folder(what) / name).read_bytes())
    except (OSError, ValueError):
        made = make()
    try:
        kept_file(what, name, lambda target: _store(target, made), again=True)
    except OSError:
        return made
    return made


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


def _folder(what: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\0".join(what).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir() / "data" / key


def _store(target: Path, arrays: Mapping[str, Any]) -> None:
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    target.write_bytes(hashlib.sha256(raw.getbuffer()).digest() + raw.getbuffer())


def _loaded(raw: bytes) -> Arrays:
    """Read arrays; ValueError if a byte is not as it was written."""
    digest, body = raw[:32], raw[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("damaged")
    with np.load(io.BytesIO(body), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
