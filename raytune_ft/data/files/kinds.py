"""Files: which kinds are read, and how each is opened."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from raytune_ft.data.files.arrow_files import open_arrow
from raytune_ft.data.files.blobs import Blob, BlobFile, LocalBlob
from raytune_ft.data.files.csv_files import open_csv
from raytune_ft.data.files.json_files import open_json, open_jsonl
from raytune_ft.data.files.kept import check_room, kept_file
from raytune_ft.data.files.plain_files import open_text
from raytune_ft.data.files.readers import Reader
from raytune_ft.errors import DataError

_OPEN: Mapping[str, Callable[[Blob, str], Reader]] = {
    ".jsonl": open_jsonl,
    ".ndjson": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": lambda blob, display: open_csv(blob, display, "\t"),
    ".parquet": open_arrow,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".txt": open_text,
}
SUFFIXES = tuple(_OPEN)
PACKED: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffix of compressed files -> Arrow's name of the method."""
_STARTS = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bz2": b"BZh"}
_CHUNK_BYTES = 8 * 2**20
_TOGETHER = 16
"""Files that are opened at a time, where there are that many: most of it is waiting."""


def is_data_file(name: str) -> bool:
    """Tell by its name whether a file can be read."""
    return Path(unpacked_name(name)).suffix.lower() in _OPEN


def unpacked_name(name: str) -> str:
    """Return a file's name without the suffix of a compression."""
    path = Path(name)
    return path.stem if path.suffix.lower() in PACKED else path.name


def kinds() -> str:
    """List the suffixes for messages."""
    return f"{', '.join(SUFFIXES)} (or one of them with {', '.join(PACKED)} behind)"


def open_readers(blobs: Sequence[tuple[Blob, str]]) -> list[Reader]:
    """Open data files, each given with its name for messages, a few at a time.

    Raises:
        DataError: as `open_reader`, of the first file in this order that cannot be read.
    """
    if len(blobs) < _TOGETHER:
        return [open_reader(blob, display) for blob, display in blobs]
    pool = ThreadPoolExecutor(_TOGETHER)
    try:
        return list(pool.map(lambda one: open_reader(*one), blobs))
    finally:
        pool.shutdown(cancel_futures=True)


def open_reader(blob: Blob, display: str) -> Reader:
    """Open a data file by its suffix.

    Raises:
        DataError: it may not be read, holds no rows, is damaged, or there is no room to unpack it.
    """
    if isinstance(blob, LocalBlob) and not os.access(blob.path, os.R_OK):
        raise DataError(f"{display}: cannot be read, permission is denied; allow it by chmod")
    if Path(blob.name).suffix.lower() in PACKED:
        blob = _unpacked(blob, display)
    return _OPEN[Path(blob.name).suffix.lower()](blob, display)


def _unpacked(blob: Blob, display: str) -> Blob:
    """Unpack a file into the cache, once: rows in the middle of a compressed one cannot be found.

    A file that only has the suffix, since a server unpacked it on the way, is taken as it is.
    """
    unpacked = UnpackedBlob(blob, blob.version, display)
    path = unpacked.path
    # a file of this machine stays known as one
    return LocalBlob(path) if isinstance(blob, LocalBlob) else unpacked


@dataclass(frozen=True)
class UnpackedBlob:
    """A compressed file from elsewhere, unpacked on each machine that reads it."""

    origin: Blob
    version: str
    display: str

    @property
    def name(self) -> str:
        """The file's name without the suffix of the compression."""
        return unpacked_name(self.origin.name)

    @property
    def place(self) -> str:
        """The compressed file's."""
        return self.origin.place

    @property
    def size(self) -> int:
        """Bytes, unpacked."""
        return self.path.stat().st_size

    @property
    def path(self) -> Path:
        """The unpacked file on this machine, made if it is not here."""
        method = PACKED[Path(self.origin.name).suffix.lower()]
        what = ("unpacked", self.place, self.version)
        return kept_file(
            what, self.name, lambda target: _unpack(self.origin, target, method, self.display)
        )

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end)."""
        return LocalBlob(self.path).read(ranges)

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on."""
        return LocalBlob(self.path).chunks(start)


def _unpack(blob: Blob, target: Path, method: str, display: str) -> None:
    import pyarrow as pa

    packed = blob.read([(0, 4)])[0].startswith(_STARTS[method])
    compression = method if packed else None
    file = pa.PythonFile(io.BufferedReader(BlobFile(blob), _CHUNK_BYTES), mode="r")
    try:
        with pa.input_stream(file, compression=compression) as source, target.open("wb") as to:
            while chunk := source.read(_CHUNK_BYTES):
                check_room(len(chunk), display)
                to.write(chunk)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise DataError(f"{display}: cannot be unpacked ({reason}); copy it again") from None
