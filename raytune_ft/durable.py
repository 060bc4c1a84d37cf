"""Durable: files and folders that are there whole, and stay after a power cut, or not at all.

Everything goes through `os`, block by block, so that tests can stop a save at each single call.
A folder is made under another name beside its place, flushed and renamed. What a stopped process
leaves has names of its own, by which `tidy` knows what to do with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK_BYTES = 16 << 20
"""Given to the system at once; Linux takes 2 GiB at most."""
WRITING = ".writing_"
"""Not whole yet."""
FORMER = ".former_"
"""Whole; moved aside for the one that takes its place."""
DROPPED = ".dropped_"
"""Not wanted any more."""


def write(
    path: Path,
    blocks: Iterable[bytes | memoryview],
    beat: Callable[[], object] = lambda: None,
) -> tuple[int, str]:
    """Write a new file; return the size and sha256 of what was given, not of what arrived.

    Args:
        path: of the new file.
        blocks: its content.
        beat: called after each block that the system took.

    Raises:
        OSError: the system refuses, or the file exists.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for block in blocks:
            digest.update(block)
            size += len(block)
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(descriptor, rest[:BLOCK_BYTES]) :]
                beat()
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder; behind the block it is `final`, on disk, in place of a former one.

    If the block or the system stops this, `final` is what it was, and nothing else is left; if
    the process ends, `tidy` does that later.

    Raises:
        OSError: the system refuses.
    """
    temporary = _beside(final, WRITING)
    final.parent.mkdir(parents=True, exist_ok=True)
    tidy(final.parent, final.name)
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Flush a folder that was filled under another name, and put it in the place of a former one.

    Raises:
        OSError: the system refuses; then the former one is what it was.
    """
    _flush(temporary)
    _put(temporary, final)


def drop(folder: Path) -> None:
    """Remove a folder so that no part of it is ever taken for the whole; not at any price."""
    aside = _beside(folder, DROPPED)
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def tidy(parent: Path, name: str = "") -> None:
    """Remove what stopped processes left in a folder, of `name` only where one is given.

    What was moved aside for a new one that never came is put back.
    """
    for left in sorted(parent.iterdir()) if parent.is_dir() else []:
        for prefix in (WRITING, FORMER, DROPPED):
            place = parent / left.name.removeprefix(prefix).rpartition("_")[0]
            if not left.name.startswith(prefix) or name not in ("", place.name):
                continue
            if prefix == FORMER and not place.exists():
                left.rename(place)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _put(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
        _fsync(final.parent)
        return
    aside = _beside(final, FORMER)
    final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        aside.rename(final)
        raise
    _fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _beside(final: Path, prefix: str) -> Path:
    return final.with_name(f"{prefix}{final.name}_{os.getpid()}")


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
