"""Store: the folder of kept shards, `tokens/KEY/NUMBER.arrow` in the cache folder of each node.

Files only appear whole (written beside, synced, renamed) and only go away whole, so any number of
processes may write, read and remove at once. Nothing here is needed for a run to be right: what
cannot be written is told once and made again.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.files.kept import check_room
from raytune_ft.errors import DataError, RecipeError

LIMIT = "RAYTUNE_TOKEN_CACHE_GIB"
"""Environment variable: GiB that all keys together take, about."""
DEFAULT_GIB, DEFAULT_SHARE = 50, 0.2
"""Without it: so many GiB, or this share of the disk if that is less."""
SCAN_EVERY = 32
"""Shards that a process writes between two looks at the folder's size."""
PARTIAL_S = 3600
"""Seconds after which a file that is being written is taken for a killed process's."""
_PARTIAL, _REMOVED = ".partial-", ".removed-"

_log = logging.getLogger(__name__)


def limit_bytes(folder: Path) -> int:
    """Return how much all keys together may take.

    Raises:
        RecipeError: the environment variable is no number of GiB.
    """
    while not folder.exists():
        folder = folder.parent
    chosen = os.environ.get(LIMIT)
    if not chosen:
        return int(min(DEFAULT_GIB * 2**30, DEFAULT_SHARE * shutil.disk_usage(folder).total))
    try:
        gib = float(chosen)
        if not 0 <= gib < 2**30:
            raise ValueError
    except ValueError:
        raise RecipeError(f"{LIMIT}: '{chosen}' is no number of GiB; write one, as in 50") from None
    return int(gib * 2**30)


class Store:
    """The shards of all keys, in one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._size = 0
        self._full = False
        self._until_scan = 0
        self._told: set[str] = set()
        self._used: set[str] = set()

    def check_limit(self) -> None:
        """Raise RecipeError if the size that all keys may take is no number."""
        limit_bytes(self._root)

    def path(self, key: str, number: int) -> Path:
        """Return where a shard is kept, whether it is there or not."""
        return self._root / key / f"{number:08d}.arrow"

    def note_use(self, key: str) -> None:
        """Note that a key is in use, once per process: the ones used last are removed last."""
        if key not in self._used:
            self._used.add(key)
            with suppress(OSError):
                os.utime(self._root / key)

    def write(self, key: str, number: int, content: bytes) -> None:
        """Keep a shard, if there is room; of several writers the last one wins.

        Tells in a line, once per process and reason, why it is not kept.
        """
        try:
            if self._has_room(key, len(content)):
                self._write(self.path(key, number), content)
                self._size += len(content)
        except OSError as error:
            self._tell(f"cannot write: {error.strerror}")
        except DataError as error:
            self._tell(str(error))

    def remove(self, key: str, number: int) -> None:
        """Remove a shard."""
        with suppress(OSError):
            self.path(key, number).unlink()

    def _write(self, target: Path, content: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(target)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _has_room(self, key: str, size: int) -> bool:
        """Make room by removing other keys, those first that were used longest ago."""
        self._root.mkdir(parents=True, exist_ok=True)
        limit = limit_bytes(self._root)
        over = self._size + size > limit
        if self._until_scan <= 0 or (over and not self._full):
            self._until_scan = SCAN_EVERY
            self._size = self._shrink(key, limit - size)
            self._full = self._size + size > limit
        self._until_scan -= 1
        if self._full:
            self._tell(f"full, all keys may take {limit / 2**30:.1f} GiB; set {LIMIT} to more")
            return False
        check_room(size, "data.cache")
        return True

    def _shrink(self, key: str, limit: int) -> int:
        """Remove other keys until all are within the limit; return what is left, in bytes."""
        sizes = {folder: _size_of(folder) for folder in self._root.iterdir() if folder.is_dir()}
        total = sum(sizes.values())
        others = [folder for folder in sizes if folder.name != key]
        for folder in sorted(others, key=_last_use):
            if total <= limit and not folder.name.startswith(_REMOVED):
                continue
            _remove(folder)
            total -= sizes[folder]
        return total

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            _log.warning("token cache %s: %s; rows are tokenised again instead", self._root, why)


@lru_cache(maxsize=8)
def _opened(root: Path) -> Store:
    return Store(root)


def store() -> Store:
    """Return this process's store of this machine."""
    return _opened(cache_dir() / "tokens")


def _size_of(folder: Path) -> int:
    """Return what a key takes on disk, in bytes; removes what killed writers left."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if entry.name.startswith(_PARTIAL) and found.st_mtime < time.time() - PARTIAL_S:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                total += found.st_size
    return total


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path) -> None:
    """Take a key away as a whole, so that nobody writes into what is being removed."""
    with suppress(OSError):
        if not folder.name.startswith(_REMOVED):
            folder = folder.rename(folder.with_name(f"{_REMOVED}{folder.name[:16]}-{os.getpid()}"))
        shutil.rmtree(folder, ignore_errors=True)
