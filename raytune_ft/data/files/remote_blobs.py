"""Remote files as blobs: read by ranges where they lie, or from a copy in this machine's cache.

Both travel to data tasks as the file's URL, size and version, without credentials: these come
from the environment of the machine that reads. (A URL's own query, which may be a signature, is
needed to read and so travels with it, but is never shown.)
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import xxhash
from fsspec.callbacks import Callback

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.files.blobs import CHUNK_BYTES, LocalBlob
from raytune_ft.data.files.kept import check_room, kept_file
from raytune_ft.data.files.remote import file_system, shown
from raytune_ft.data.files.remote_ranges import (
    changed,
    is_fixed,
    is_now,
    patient,
    read_ranges,
    unreadable,
)
from raytune_ft.errors import DataError, RecipeError

UNIT_BYTES = 64 * 2**10
"""What is fetched and kept as one: rows near each other are mostly read one after the other."""
KEPT_BYTES = 256 * 2**20
"""Units kept per process: about the rows of one pool, over which its windows' rows lie."""
_GAP_UNITS = 4
"""A gap of so many units costs less to fetch than another request."""
_PART_BYTES = 8 * 2**20
_LARGE_BYTES = 4 * 2**20
"""A larger range is read once by whoever asks for it, and not kept."""
_FRESH_S = 60.0
"""A version looked up so lately is not looked up again; every answer with bytes tells it anyway."""
_TRIES = 4
"""Of a whole file."""
_UNSAFE = re.compile(r"[^\w.-]+")
_CONTENT = "content-"


@dataclass(frozen=True)
class RemoteBlob:
    """A file that is read by ranges where it lies; `pinned` is its version when it was found."""

    url: str = field(repr=False)
    size: int
    pinned: str

    @property
    def name(self) -> str:
        """The file's name."""
        return file_name(self.url)

    @property
    def place(self) -> str:
        """Its URL, without what may be a signature."""
        return shown(self.url)

    @property
    def version(self) -> str:
        """Its ETag, or the time of its last change, as of a minute ago at most."""
        if is_fixed(self.url):
            return self.pinned
        if time.monotonic() - _looked.get(self, -_FRESH_S) >= _FRESH_S:
            if not is_now(self.url, self.size, self.pinned):
                return f"not {self.pinned}"
            _looked[self] = time.monotonic()
        return self.pinned

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end).

        Raises:
            DataError: the file changed since it was found, or cannot be read.
        """
        bounds = [(min(start, self.size), min(end, self.size)) for start, end in ranges]
        large = [pair for pair in bounds if pair[1] - pair[0] > _LARGE_BYTES]
        small = [pair for pair in bounds if 0 < pair[1] - pair[0] <= _LARGE_BYTES]
        units = self._units(small)
        whole = dict(zip(large, self._whole(large), strict=True))
        return [
            whole[pair] if pair in whole else _joined(units, *pair) if pair in small else b""
            for pair in bounds
        ]

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch the units of small ranges, so that reading them soon does not wait."""
        self._units([pair for pair in ranges if 0 < pair[1] - pair[0] <= _LARGE_BYTES])

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on, the next ones fetched meanwhile."""
        places = range(start, self.size, CHUNK_BYTES)
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for place in places:
                now = ahead or pool.submit(self._chunk, place)
                after = place + CHUNK_BYTES
                ahead = pool.submit(self._chunk, after) if after < self.size else None
                yield now.result()

    def _chunk(self, start: int) -> bytes:
        end = min(start + CHUNK_BYTES, self.size)
        # small files' rows are read soon after
        read = self.read if self.size <= _LARGE_BYTES else self._whole
        return read([(start, end)])[0]

    def _whole(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges in parts of a few MiB, side by side."""
        parts = [
            [(place, min(place + _PART_BYTES // 2, end))
             for place in range(start, end, _PART_BYTES // 2)]
            for start, end in ranges
        ]  # fmt: skip
        if not parts:
            return []
        flat = [pair for some in parts for pair in some]
        found = iter(read_ranges(self.url, flat, self.size, self.pinned))
        return [b"".join(next(found) for _ in some) for some in parts]

    def _units(self, ranges: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        """Return the units that hold the ranges, by number; those not kept are fetched."""
        wanted = sorted(
            {
                unit
                for start, end in ranges
                for unit in range(start // UNIT_BYTES, (end - 1) // UNIT_BYTES + 1)
            }
        )
        key = (self.url, self.pinned)
        found = _kept.get(key, wanted)
        runs = _runs([unit for unit in wanted if unit not in found])
        spans = [(a * UNIT_BYTES, min(b * UNIT_BYTES, self.size)) for a, b in runs]
        fetched = read_ranges(self.url, spans, self.size, self.pinned) if spans else []
        fresh = {
            unit: raw[(unit - first) * UNIT_BYTES : (unit - first + 1) * UNIT_BYTES]
            for (first, end), raw in zip(runs, fetched, strict=True)
            for unit in range(first, end)
        }
        _kept.put(key, fresh)
        return found | fresh


def file_name(url: str) -> str:
    """Return the name of the file that a URL names, safe as one of this machine."""
    name = PurePosixPath(urlsplit(url).path).name
    return _UNSAFE.sub("_", unquote(name)).lstrip(".") or "rows"


def _runs(units: Sequence[int]) -> list[tuple[int, int]]:
    """Join units to runs [first, end), over small gaps, of at most _PART_BYTES."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        near = runs and unit - runs[-1][1] <= _GAP_UNITS
        if near and (unit + 1 - runs[-1][0]) * UNIT_BYTES <= _PART_BYTES:
            runs[-1] = (runs[-1][0], unit + 1)
        else:
            runs.append((unit, unit + 1))
    return runs


def _joined(units: dict[int, bytes], start: int, end: int) -> bytes:
    first, last = start // UNIT_BYTES, (end - 1) // UNIT_BYTES
    raw = units[first] if first == last else b"".join(units[n] for n in range(first, last + 1))
    return raw[start - first * UNIT_BYTES : end - first * UNIT_BYTES]


class _Kept:
    """The units read last, as many as KEPT_BYTES hold."""

    def __init__(self) -> None:
        self._units: OrderedDict[tuple[tuple[str, str], int], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str], units: Sequence[int]) -> dict[int, bytes]:
        """Return those of the units that are kept."""
        with self._lock:
            found = {unit: self._units[key, unit] for unit in units if (key, unit) in self._units}
            for unit in found:
                self._units.move_to_end((key, unit))
            return found

    def put(self, key: tuple[str, str], units: dict[int, bytes]) -> None:
        """Keep units, and let go of those used longest ago."""
        with self._lock:
            for unit, raw in units.items():
                self._size += len(raw) - len(self._units.pop((key, unit), b""))
                self._units[key, unit] = raw
            while self._size > KEPT_BYTES:
                self._size -= len(self._units.popitem(last=False)[1])


_kept = _Kept()
_looked: dict[RemoteBlob, float] = {}
"""When versions were looked up, in this process."""


def note_found(blob: RemoteBlob) -> None:
    """Remember that a blob's version was looked up just now, by the listing that found it."""
    _looked[blob] = time.monotonic()


@dataclass(frozen=True)
class KeptBlob:
    """A copy of a remote file: that of this machine, which is fetched when it is not here yet."""

    origin: RemoteBlob

    @property
    def name(self) -> str:
        """The file's name."""
        return self.origin.name

    @property
    def place(self) -> str:
        """The origin's URL, the same on every machine."""
        return self.origin.place

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    @property
    def version(self) -> str:
        """The origin's when the run began: a copy is written once."""
        return self.origin.pinned

    @property
    def path(self) -> Path:
        """The copy on this machine; DataError if it is not here and cannot be fetched."""
        return _copy_of(self.origin, str(cache_dir()))

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end)."""
        return LocalBlob(self.path).read(ranges)

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on."""
        return LocalBlob(self.path).chunks(start)


def copied(origin: RemoteBlob, size: int | None, *, told: bool = False) -> KeptBlob:
    """Fetch a file for a run that begins, unless this version of it is here.

    Args:
        origin: without a version, if the server tells none: then it is fetched at any rate.
        size: bytes, if known.
        told: somebody already says that it is fetched.

    Raises:
        DataError: there is no room, or what came is incomplete.
        Exception: of the file system's library.
    """
    if origin.pinned:
        _fetched(origin, size, told=told)
        return KeptBlob(origin)
    path = _fetched(origin, size, again=True, told=told)
    return KeptBlob(RemoteBlob(origin.url, path.stat().st_size, _content(path)))


@functools.lru_cache(maxsize=4096)
def _copy_of(origin: RemoteBlob, _cache: str) -> Path:
    """Return this machine's copy of what the run began with."""
    known = not origin.pinned.startswith(_CONTENT)
    try:
        path = _fetched(origin if known else RemoteBlob(origin.url, origin.size, ""), origin.size)
    except (DataError, RecipeError):
        raise
    except Exception as error:  # each file system raises errors of its own library
        raise unreadable(origin.place, error) from None
    if not known and _content(path) != origin.pinned:
        raise changed(origin.place)
    return path


def _content(path: Path) -> str:
    """Return what stands for the version of a file that has none."""
    digest = xxhash.xxh3_128()
    for chunk in LocalBlob(path).chunks():
        digest.update(chunk)
    return f"{_CONTENT}{digest.hexdigest()}"


def _fetched(
    origin: RemoteBlob, size: int | None, *, again: bool = False, told: bool = False
) -> Path:
    """Return the copy of a file in the cache folder, made if it is not there."""
    place = origin.place

    def make(target: Path) -> None:
        check_room(size or 0, place)
        if not told:
            known = f" ({size / 2**20:.1f} MiB)" if size else ""
            print(f"fetching {place}{known}", file=sys.stderr, flush=True)
        patient(lambda: _download(origin, target, size), _TRIES, (_ShortError,))
        # what came is of the version that was asked for if that is still the one there
        pinned = origin.pinned and not is_fixed(origin.url)
        if pinned and not is_now(origin.url, origin.size, origin.pinned):
            raise changed(place)

    what = ("fetched", origin.url, origin.pinned)
    return kept_file(what, origin.name, make, again=again)


def _download(origin: RemoteBlob, target: Path, size: int | None) -> None:
    files, path = file_system(origin.url)
    files.get_file(path, str(target), callback=_Room(origin.place))
    got = target.stat().st_size
    if size is not None and got != size:
        raise _ShortError(f"{origin.place}: {got} bytes came of {size}; try again")


class _ShortError(DataError):
    """A download that ended too early."""


class _Room(Callback):  # type: ignore[misc]
    """Stops a download that would fill the disk."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        check_room(0, self._place)
