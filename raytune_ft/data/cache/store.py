"""Store: the folder of kept shards, `tokens/KEY/NUMBER.arrow` in the cache folder of each node.

Files only appear whole (written beside, synced, renamed) and only go away whole, so any number of
processes may write, read and remove at once. Nothing here is needed for a run to be right: what
cannot be written is told once and made again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from raytune_ft.config.cache import cache_dir
from raytune_ft.config.cache_room import PARTIAL, limit_bytes, shrink
from raytune_ft.data.files.kept import check_room
from raytune_ft.errors import DataError

LIMIT = "RAYTUNE_TOKEN_CACHE_GIB"
"""Environment variable: GiB that all keys together take, about."""
SCAN_EVERY = 32
"""Shards that a process writes between two looks at the folder's size."""

_log = logging.getLogger(__name__)


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
        limit_bytes(self._root, LIMIT)

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
        handle, partial = tempfile.mkstemp(prefix=PARTIAL, dir=target.parent)
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
        limit = limit_bytes(self._root, LIMIT)
        over = self._size + size > limit
        if self._until_scan <= 0 or (over and not self._full):
            self._until_scan = SCAN_EVERY
            self._size = shrink(self._root, key, limit - size)
            self._full = self._size + size > limit
        self._until_scan -= 1
        if self._full:
            self._tell(f"full, all keys may take {limit / 2**30:.1f} GiB; set {LIMIT} to more")
            return False
        check_room(size, "data.cache")
        return True

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
