"""Arrow and Parquet files: rows by groups, a few of which each process keeps.

Files are hostile until shown otherwise. Arrow rebuilds extension types while it opens a file, and
a registered Python type may then unpickle what the file says. So the stored schema is looked at
first, with that step made impossible, and only types that Arrow itself implements go on.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.data.files.readers import ADVICE, DataRow, Offsets
from raytune_ft.errors import DataError

GROUPS_KEPT = 32
"""Groups of rows kept per process, since a window's rows lie all over the file."""
_MAGIC, _PARQUET = b"ARROW1", b"PAR1"
_NAME_KEY, _HIDDEN_KEY = b"ARROW:extension:name", b"ARROW:extension:nam_"
"""Equally long, so that one can take the other's place in a schema's bytes."""
_STORED_SCHEMA = re.compile(rb"ARROW:schema(\x18(?:[\x80-\xff]*[\x00-\x7f]))?")
"""Parquet's key for Arrow's schema; behind it a Thrift string: type, length, base64."""
HARMLESS = frozenset({"arrow.json", "arrow.uuid", "arrow.bool8", "arrow.fixed_shape_tensor"})
"""Extension types that Arrow implements in C++."""


@dataclass(frozen=True)
class GroupReader:
    """Rows of a file in groups; `group_ends` int64 (groups,) counts rows up to each group's end."""

    path: Path
    display: str
    group_ends: Offsets

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.group_ends[-1])

    def chunk_ends(self) -> Offsets:
        """Return where groups end, int64 (groups,)."""
        return self.group_ends

    def where(self, row: int) -> str:
        """Return the row's file and number, from 1."""
        return f"{self.display}:{row + 1}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read the groups that hold the rows, and take the rows from them."""
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.searchsorted(self.group_ends, wanted, side="right")
        found: list[DataRow | DataError] = [{}] * len(wanted)
        changed = self.path.stat().st_mtime_ns
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            first = int(self.group_ends[group - 1]) if group else 0
            try:
                table = _group(str(self.path), changed, int(group))
                taken = table.take(wanted[places] - first).to_pylist()
            except _unreadable() as error:
                for place in places:
                    where = self.where(int(wanted[place]))
                    found[place] = DataError(
                        f"{where}: cannot be read ({_reason(error)}); {ADVICE}"
                    )
                continue
            for place, row in zip(places, taken, strict=True):
                found[place] = {name: without_nulls(value) for name, value in row.items()}
        return found


def without_nulls(value: Any) -> Any:
    """Leave out the null members of objects: Arrow has no other way to say that one is absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def open_arrow(path: Path, display: str) -> GroupReader:
    """Open a Parquet file, or an Arrow file or stream; the content tells, not the suffix.

    Raises:
        DataError: damaged, without rows, or with extension types of unknown libraries.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start.startswith(_PARQUET):
            sizes = _parquet_sizes(path, display)
        elif start == _MAGIC:
            sizes = _file_sizes(path, display)
        else:
            sizes = _stream_sizes(path, display)
        if any(size < 0 for size in sizes):
            raise ValueError("a group of less than no rows")
    except _unreadable() as error:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise DataError(f"{display}: not {kind} file ({_reason(error)}); copy it again") from None
    if not sum(sizes):
        raise DataError(f"{display}: no rows; write rows into it")
    return GroupReader(path, display, np.cumsum(sizes, dtype=np.int64))


@functools.lru_cache(maxsize=GROUPS_KEPT)
def _group(path: str, changed_ns: int, group: int) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    if _kind(path) == _PARQUET:
        with parquet.ParquetFile(path) as file:
            table = file.read_row_group(group)
    else:
        table = pa.Table.from_batches([_opened(path, changed_ns)[group]])
    # an Arrow file is mapped as it is: wrong offsets would be followed out of memory
    table.validate(full=True)
    return table


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what Arrow raises for damaged files."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, IndexError)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _kind(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(len(_PARQUET))


class _FileBatches:
    """Batches of an Arrow file, read when asked for."""

    def __init__(self, path: str) -> None:
        from pyarrow import ipc

        self._reader = ipc.open_file(_mapped(path))

    def __getitem__(self, number: int) -> Any:
        return self._reader.get_batch(number)


@functools.lru_cache(maxsize=GROUPS_KEPT)
def _opened(path: str, _changed_ns: int) -> Any:
    """Return the batches of an Arrow file or stream by number, mapped into memory."""
    from pyarrow import ipc

    if _kind(path) == _MAGIC[: len(_PARQUET)]:
        return _FileBatches(path)
    with ipc.open_stream(_mapped(path)) as stream:
        return list(stream)


def _mapped(path: str | Path) -> Any:
    import pyarrow as pa

    return pa.memory_map(str(path), "r")


def _parquet_sizes(path: Path, display: str) -> list[int]:
    from pyarrow import parquet

    footer = _footer(path, 4, len(_PARQUET))
    for found in _STORED_SCHEMA.finditer(footer):
        if found[1] is None:
            raise DataError(f"{display}: its Arrow schema cannot be read; write the file again")
        _check_types(_stored_schema(footer, found), display)
    metadata = parquet.read_metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _stored_schema(footer: bytes, found: re.Match[bytes]) -> bytes:
    size, shift = 0, 0
    for byte in found[1][1:]:
        size, shift = size | (byte & 0x7F) << shift, shift + 7
    try:
        return base64.b64decode(footer[found.end() : found.end() + size], validate=True)
    except binascii.Error as error:
        raise ValueError(f"stored schema: {error}") from None


def _footer(path: Path, size_bytes: int, magic_bytes: int) -> bytes:
    """Return what stands before a file's last `size_bytes` of length and its magic word."""
    with path.open("rb") as file:
        whole = path.stat().st_size
        file.seek(max(0, whole - size_bytes - magic_bytes))
        size = int.from_bytes(file.read(size_bytes), "little")
        start = whole - size_bytes - magic_bytes - size
        if start < 0 or size < 0:
            raise ValueError("it ends in the middle")
        file.seek(start)
        return file.read(size)


def _file_sizes(path: Path, display: str) -> list[int]:
    from pyarrow import ipc

    if _NAME_KEY in _footer(path, 4, len(_MAGIC)):
        # the footer is no message of its own, so its types cannot be looked at without risk
        raise DataError(f"{display}: has extension types; write plain columns, or Parquet")
    with ipc.open_file(_mapped(path)) as file:
        return [file.get_batch(number).num_rows for number in range(file.num_record_batches)]


def _stream_sizes(path: Path, display: str) -> list[int]:
    from pyarrow import ipc

    with _mapped(path) as source:
        first = ipc.read_message(source)
        if first.type != "schema":
            raise ValueError("it does not begin with a schema")
        _check_types(first.serialize().to_pybytes(), display)
    with ipc.open_stream(_mapped(path)) as stream:
        return [batch.num_rows for batch in stream]


def _check_types(schema: bytes, display: str) -> None:
    """Raise DataError if a schema names extension types other than Arrow's own.

    Args:
        schema: a serialised schema message; its types are hidden from Arrow before it reads it.
        display: the file's name.
    """
    import pyarrow as pa
    from pyarrow import ipc

    if _NAME_KEY not in schema:
        return
    shown = ipc.read_schema(pa.py_buffer(schema.replace(_NAME_KEY, _HIDDEN_KEY)))
    for field in _fields(shown):
        kind = (field.metadata or {}).get(_HIDDEN_KEY, b"").decode("utf-8", "replace")
        if kind and kind not in HARMLESS:
            raise DataError(
                f"{display}: column '{field.name}' is of the extension type '{kind[:60]}', which "
                "is not read, since such types may run code; write it as a plain column"
            )


def _fields(fields: Iterable[Any]) -> Iterator[Any]:
    """Yield the fields of a schema, those inside of others too."""
    for field in fields:
        yield field
        yield from _fields(field.type.field(place) for place in range(field.type.num_fields))
