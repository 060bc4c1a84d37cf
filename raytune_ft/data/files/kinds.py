"""Files: which kinds are read, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from raytune_ft.data.files.arrow_files import open_arrow
from raytune_ft.data.files.csv_files import open_csv
from raytune_ft.data.files.json_files import open_json, open_jsonl
from raytune_ft.data.files.kept import check_room, kept_file
from raytune_ft.data.files.plain_files import open_text
from raytune_ft.data.files.readers import Reader
from raytune_ft.errors import DataError

_OPEN: Mapping[str, Callable[[Path, str], Reader]] = {
    ".jsonl": open_jsonl,
    ".ndjson": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": lambda path, display: open_csv(path, display, "\t"),
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


def open_reader(path: Path, display: str) -> Reader:
    """Open a data file by its suffix.

    Raises:
        DataError: it holds no rows, is damaged, or there is no room to unpack it.
    """
    if path.suffix.lower() in PACKED:
        path = _unpacked(path, display)
    return _OPEN[path.suffix.lower()](path, display)


def _unpacked(path: Path, display: str) -> Path:
    """Unpack a file into the cache, once: rows in the middle of a compressed one cannot be found.

    A file that only has the suffix, since a server unpacked it on the way, is taken as it is.
    """
    method = PACKED[path.suffix.lower()]
    state = path.stat()
    version = (str(path.resolve()), str(state.st_size), str(state.st_mtime_ns))

    def make(target: Path) -> None:
        _unpack(path, target, method, display)

    return kept_file(("unpacked", *version), unpacked_name(path.name), make)


def _unpack(path: Path, target: Path, method: str, display: str) -> None:
    import pyarrow as pa

    with path.open("rb") as file:
        packed = file.read(4).startswith(_STARTS[method])
    compression = method if packed else None
    try:
        with pa.input_stream(str(path), compression=compression) as source, target.open("wb") as to:
            while chunk := source.read(_CHUNK_BYTES):
                check_room(len(chunk), display)
                to.write(chunk)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise DataError(f"{display}: cannot be unpacked ({reason}); copy it again") from None
