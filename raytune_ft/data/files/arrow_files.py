"""Arrow and Parquet files: rows by stretches, of which each process keeps some.

A stretch is a group of rows of the file, or a part of a large one. Files are hostile until shown
otherwise. Arrow rebuilds extension types while it opens a file, and a registered Python type may
then unpickle what the file says. So the stored schema is looked at first, with that step made
impossible, and only types that Arrow itself implements go on (`arrow_types`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.data.files import readers
from raytune_ft.data.files.arrow_types import (
    MAGIC,
    PARQUET,
    check_file,
    check_parquet,
    check_stream,
)
from raytune_ft.data.files.blobs import Blob, BlobFile, LocalBlob
from raytune_ft.data.files.readers import ADVICE, DataRow, FileReader, Offsets, too_long
from raytune_ft.data.files.remote_blobs import KeptBlob, RemoteBlob
from raytune_ft.errors import DataError

KEPT_BYTES = 384 * 2**20
"""Decoded stretches kept per process, since a window's rows lie all over a pool of them."""
STRETCH_BYTES = 64 * 2**20
"""Larger groups of rows are divided; what is before a stretch of such a group is read over."""
_BATCH_ROWS = 1024
_TAKEN_BYTES = 2**30
"""Arrow takes rows of text columns up to twice as large."""
_PAGE_BYTES = 2**20
_FILES_OPEN = 16


@dataclass(frozen=True)
class GroupReader(FileReader):
    """Rows of a file in stretches.

    `ends` int64 (stretches,) counts rows up to each one's end; `groups` uint32 (stretches,) is
    the file's group that each is of. `kind`: how the file begins.
    """

    ends: Offsets
    groups: npt.NDArray[np.uint32]
    kind: bytes

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.ends[-1])

    def chunk_ends(self) -> Offsets:
        """Return where stretches end, int64 (stretches,)."""
        return self.ends[np.diff(self.ends, prepend=0) > 0]

    def where(self, row: int) -> str:
        """Return the row's file and number, from 1."""
        return f"{self.display}:{row + 1}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read the stretches that hold the rows, and take the rows from them."""
        wanted = np.asarray(rows, dtype=np.int64)
        stretches = np.searchsorted(self.ends, wanted, side="right")
        found: list[DataRow | DataError] = [{}] * len(wanted)
        # kept ones first: where a pool is larger than what is kept, these would all be gone else
        for stretch in sorted(np.unique(stretches).tolist(), key=self._is_missing):
            places = np.flatnonzero(stretches == stretch)
            first = int(self.ends[stretch - 1]) if stretch else 0
            try:
                taken = self._taken(stretch, wanted[places] - first)
            except _unreadable() as error:
                for place in places.tolist():
                    where = self.where(int(wanted[place]))
                    found[place] = DataError(
                        f"{where}: cannot be read ({_reason(error)}); {ADVICE}"
                    )
                continue
            for place, row in zip(places.tolist(), taken, strict=True):
                found[place] = self._row(row, int(wanted[place]))
        return found

    def _is_missing(self, stretch: int) -> bool:
        return (self.blob.place, self.version, stretch) not in _kept

    def _row(self, row: DataRow | int, number: int) -> DataRow | DataError:
        if isinstance(row, int):
            return too_long(self.where(number), row)
        return {name: without_nulls(value) for name, value in row.items()}

    def _taken(self, stretch: int, places: Offsets) -> list[DataRow | int]:
        """Return rows of a stretch by place; of one over the limit, its bytes."""
        key = (self.blob.place, self.version, stretch)
        table = _kept.get(key)
        if table is None:
            table, places = self._decoded(key, places)
        return _rows_of(table, places)

    def _decoded(self, key: tuple[str, str, int], places: Offsets) -> tuple[Any, Offsets]:
        """Decode a stretch, and keep it; one that turns out too large, only the rows wanted.

        Returns:
            A table, and the places of the rows in it.
        """
        import pyarrow as pa

        stretch = key[2]
        self.check_unchanged()
        start, stop = self._in_group(stretch)
        batches, size, whole = list[Any](), 0, True
        kept, distinct = np.unique(places, return_inverse=True)
        for place, batch in _batches(self, int(self.groups[stretch]), start, stop):
            if whole:
                batches.append((place, batch))
                size += batch.nbytes
                if size > KEPT_BYTES // 2:
                    whole = False
                    batches = [(p, _picked(b, p, kept)) for p, b in batches]
            else:
                batches.append((place, _picked(batch, place, kept)))
        table = pa.Table.from_batches([batch for _, batch in batches])
        if whole:
            _kept.put(key, table, size)
            return table, places
        return table, distinct.astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as bytes: of most files there are but a few numbers."""
        head = (self.blob, self.display, self.version, self.fingerprint)
        return _unpickled, (*head, self.ends.tobytes(), self.groups.tobytes(), self.kind)

    def _in_group(self, stretch: int) -> tuple[int, int]:
        """Return the rows [start, stop) of its group that a stretch is."""
        first = int(np.searchsorted(self.groups, self.groups[stretch]))
        before, start = (int(self.ends[n - 1]) if n else 0 for n in (first, stretch))
        return start - before, int(self.ends[stretch]) - before


def without_nulls(value: Any) -> Any:
    """Leave out the null members of objects: Arrow has no other way to say that one is absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def open_arrow(blob: Blob, display: str) -> GroupReader:
    """Open a Parquet file, or an Arrow file or stream; the content tells, not the suffix.

    Raises:
        DataError: damaged, without rows, or with extension types of unknown libraries.
    """
    version = blob.version
    (start,) = blob.read([(0, len(MAGIC))])
    kind = PARQUET if start.startswith(PARQUET) else start
    try:
        if kind not in (PARQUET, MAGIC):
            blob = _mappable(blob)
        groups = _groups(blob, kind, display)
        if any(rows < 0 for rows, _ in groups):
            raise ValueError("a group of less than no rows")
    except _unreadable() as error:
        what = "a Parquet" if blob.name.endswith(".parquet") else "an Arrow"
        raise DataError(f"{display}: not {what} file ({_reason(error)}); copy it again") from None
    if not sum(rows for rows, _ in groups):
        raise DataError(f"{display}: no rows; write rows into it")
    ends, numbers = _stretches(groups)
    return GroupReader(blob, display, blob.version, version, ends, numbers, kind)


class _Kept:
    """The stretches used last, as many as KEPT_BYTES hold."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, str, int], tuple[Any, int]] = OrderedDict()
        self._size = 0

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._tables

    def get(self, key: tuple[str, str, int]) -> Any | None:
        """Return a table, None if it is not kept."""
        if key not in self._tables:
            return None
        self._tables.move_to_end(key)
        return self._tables[key][0]

    def put(self, key: tuple[str, str, int], table: Any, size: int) -> None:
        """Keep a table, and let go of those used longest ago."""
        while self._tables and self._size + size > KEPT_BYTES:
            self._size -= self._tables.popitem(last=False)[1][1]
        self._tables[key] = (table, size)
        self._size += size


_kept = _Kept()


def _batches(reader: GroupReader, group: int, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """Yield rows [start, stop) of a group as batches, each with its place from `start` on."""
    if reader.kind != PARQUET:
        batch = _opened(reader.blob, reader.version, reader.kind)[group].slice(start, stop - start)
        # it is mapped as it is: wrong offsets would be followed out of memory
        batch.validate(full=True)
        yield 0, batch
        return
    place = -start
    for batch in _parquet_batches(reader.blob, reader.version, group):
        first, last = max(0, -place), min(batch.num_rows, stop - start - place)
        if last > first:
            part = batch.slice(first, last - first)
            part.validate(full=True)
            yield place + first, part
        place += batch.num_rows
        if place >= stop - start:
            return


def _parquet_batches(blob: Blob, version: str, group: int) -> Iterator[Any]:
    from pyarrow import parquet

    metadata = _metadata(blob, version)
    # a large group is decoded page by page, another one is fetched at once
    large = metadata.row_group(group).total_byte_size > STRETCH_BYTES
    options = {"buffer_size": _PAGE_BYTES, "pre_buffer": False} if large else {}
    with parquet.ParquetFile(_source(blob), metadata=metadata, **options) as file:
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group])


def _picked(batch: Any, place: int, kept: Offsets) -> Any:
    """Copy rows out of a batch that begins at `place`, so that it can be let go of."""
    first, last = np.searchsorted(kept, [place, place + batch.num_rows])
    return batch.take(_indices(kept[first:last] - place))


def _rows_of(table: Any, places: Offsets) -> list[DataRow | int]:
    """Return rows by place; of one over the limit, its bytes."""
    limit = readers.MAX_ROW_BYTES
    taken = table.take(_indices(places)) if table.nbytes < _TAKEN_BYTES else None
    if taken is not None and taken.nbytes <= limit:
        return list(taken.to_pylist())
    rows: list[DataRow | int] = []
    for place in places.tolist():
        one = table.slice(place, 1)
        rows.append(int(one.nbytes) if one.nbytes > limit else one.to_pylist()[0])
    return rows


def _indices(places: Offsets) -> Any:
    import pyarrow as pa

    return pa.array(places, type=pa.int64())


def _groups(blob: Blob, kind: bytes, display: str) -> list[tuple[int, int]]:
    """Return rows and bytes of each group, after the types were looked at."""
    from pyarrow import ipc

    if kind == PARQUET:
        check_parquet(blob, display)
        metadata = _metadata(blob, blob.version)
        found = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in found]
    if kind == MAGIC:
        check_file(blob, display)
        with ipc.open_file(_mapped(blob)) as file:
            sizes = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    else:
        with _mapped(blob) as source:
            check_stream(source, display)
        with ipc.open_stream(_mapped(blob)) as stream:
            sizes = [batch.num_rows for batch in stream]
    row_bytes = blob.size / max(sum(sizes), 1)
    return [(rows, int(rows * row_bytes)) for rows in sizes]


def _stretches(groups: Sequence[tuple[int, int]]) -> tuple[Offsets, npt.NDArray[np.uint32]]:
    """Divide groups, given as (rows, bytes), into stretches of about STRETCH_BYTES.

    Returns:
        Rows up to the end of each stretch, and the group that it belongs to.
    """
    parts = [max(1, min(rows, -(-size // STRETCH_BYTES))) for rows, size in groups]
    sizes = [
        (part + 1) * rows // n - part * rows // n
        for (rows, _), n in zip(groups, parts, strict=True)
        for part in range(n)
    ]
    return np.cumsum(sizes, dtype=np.int64), np.repeat(
        np.arange(len(groups), dtype=np.uint32), parts
    )


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what Arrow raises for damaged files."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, IndexError)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class _FileBatches:
    """Batches of an Arrow file, read when asked for."""

    def __init__(self, blob: Blob) -> None:
        from pyarrow import ipc

        self._reader = ipc.open_file(_mapped(blob))

    def __getitem__(self, number: int) -> Any:
        return self._reader.get_batch(number)


@functools.lru_cache(maxsize=_FILES_OPEN)
def _opened(blob: Blob, _version: str, kind: bytes) -> Any:
    """Return the batches of an Arrow file or stream by number, mapped into memory."""
    from pyarrow import ipc

    if kind == MAGIC:
        return _FileBatches(blob)
    with ipc.open_stream(_mapped(blob)) as stream:
        return list(stream)


@functools.lru_cache(maxsize=_FILES_OPEN)
def _metadata(blob: Blob, _version: str) -> Any:
    from pyarrow import parquet

    return parquet.read_metadata(_source(blob))


def _source(blob: Blob) -> Any:
    """Return what Arrow reads a blob from."""
    import pyarrow as pa

    if isinstance(blob, LocalBlob | KeptBlob):
        return str(blob.path)
    return pa.PythonFile(BlobFile(blob), "r")


def _mapped(blob: Blob) -> Any:
    import pyarrow as pa

    source = _source(blob)
    return pa.memory_map(source, "r") if isinstance(source, str) else source


def _mappable(blob: Blob) -> Blob:
    """Copy a stream that lies elsewhere into the cache: its batches are found by reading it all."""
    return KeptBlob(blob) if isinstance(blob, RemoteBlob) else blob


def _unpickled(
    blob: Blob,
    display: str,
    version: str,
    fingerprint: str,
    ends: bytes,
    groups: bytes,
    kind: bytes,
) -> GroupReader:
    numbers = np.frombuffer(ends, np.int64), np.frombuffer(groups, np.uint32)
    return GroupReader(blob, display, version, fingerprint, *numbers, kind)
