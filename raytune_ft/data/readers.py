"""Readers: any row of one file by its number, without reading what stands before it.

JSON lines and JSON arrays are kept as byte ranges (16 bytes a row), Parquet by row group. A reader
travels to data tasks as its path and these numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from raytune_ft.data.columns import describe
from raytune_ft.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_ROW_BYTES = 64 * 2**20
"""A longer line is a mistake, such as a file without line breaks."""
CHUNK_BYTES = 16 * 2**20
GROUPS_KEPT = 32
"""Parquet row groups kept per process, since a window's rows lie all over the file."""
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_SPACE = " \t\r\n"

Offsets = npt.NDArray[np.int64]
DataRow = dict[str, Any]


class Reader(Protocol):
    """Rows of one file."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read rows by number, each as its columns or as what is wrong with it."""
        ...

    def where(self, row: int) -> str:
        """Return the row's place, `file.jsonl:12`."""
        ...


def open_reader(path: Path, display: str) -> Reader:
    """Open a data file by its suffix; DataError if it holds no rows or is damaged."""
    if path.suffix == ".parquet":
        return _open_parquet(path, display)
    with path.open("rb") as file:
        start = file.read(4096)
        if not start:
            raise DataError(f"{display}: the file is empty; remove it or write rows into it")
        if start.startswith(_UTF16):
            raise DataError(f"{display}: the text is UTF-16; save it as UTF-8")
        is_array = start.removeprefix(_BOM).lstrip().startswith(b"[")
        skip = len(_BOM) if start.startswith(_BOM) else 0
        if path.suffix == ".json" and is_array:
            return _index_array(path.read_bytes()[skip:], skip, path, display)
        return _index_lines(file, skip, path, display)


@dataclass(frozen=True)
class TextReader:
    """JSON rows as byte ranges; `starts`, `ends`, `lines` (from 1) are int64 of shape (rows,)."""

    path: Path
    display: str
    starts: Offsets
    ends: Offsets
    lines: Offsets

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def where(self, row: int) -> str:
        """Return the row's file and line."""
        return f"{self.display}:{self.lines[row]}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Seek to each row and parse it."""
        with self.path.open("rb") as file:
            return [self._read_one(file, row) for row in rows]

    def _read_one(self, file: BinaryIO, row: int) -> DataRow | DataError:
        where, start = self.where(row), int(self.starts[row])
        size = int(self.ends[row]) - start
        if size > MAX_ROW_BYTES:
            return DataError(
                f"{where}: one row of {size / 2**20:.0f} MiB, at most {MAX_ROW_BYTES // 2**20} "
                "are read; write one JSON object per line"
            )
        file.seek(start)
        try:
            return parse_row(file.read(size), where)
        except DataError as error:
            return error


def parse_row(raw: bytes, where: str) -> DataRow:
    """Parse one JSON object; DataError says what it is instead."""
    advice = "correct it, or leave it out with data.on_bad_row: skip"
    if b"\0" in raw:
        raise DataError(f"{where}: holds NUL bytes, the file is damaged; {advice}")
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; {advice}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({_reason(error)}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON ({error}); {advice}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row is {describe(row)}, not an object; {advice}")
    return row


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg} at column {error.colno}"


def _index_lines(file: BinaryIO, skip: int, path: Path, display: str) -> TextReader:
    """Find the lines of a file in one pass; blank ones are left out."""
    file.seek(0)
    offset = 0
    breaks: list[Offsets] = []
    while chunk := file.read(CHUNK_BYTES):
        breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
        offset += len(chunk)
    ends = np.concatenate([*breaks, [offset]]).astype(np.int64)
    starts = np.concatenate([[skip], ends[:-1] + 1]).astype(np.int64)
    kept = ends > starts
    for line in np.flatnonzero(kept & (ends - starts < 16)):  # a blank line may hold spaces
        file.seek(int(starts[line]))
        kept[line] = bool(file.read(int(ends[line] - starts[line])).strip())
    if not kept.any():
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
    return TextReader(path, display, starts[kept], ends[kept], np.flatnonzero(kept) + 1)


def _index_array(raw: bytes, skip: int, path: Path, display: str) -> TextReader:
    """Find the elements of a JSON array; DataError names the line where it breaks."""
    if b"\0" in raw:
        raise DataError(f"{display}: holds NUL bytes, the file is damaged; copy it again")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{display}:{line}: not UTF-8; save the file as UTF-8") from None
    try:
        spans = np.array(list(_elements(text)), dtype=np.int64).reshape(-1, 2)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{display}:{error.lineno}: not valid JSON ({_reason(error)}); correct the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{display}: not usable JSON ({error}); correct the file") from None
    if not len(spans):
        raise DataError(f"{display}: an empty array; write rows into it")
    if not text.isascii():
        spans = _byte_offsets(text, spans)
    breaks = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord("\n"))
    lines = np.searchsorted(breaks, spans[:, 0]) + 1
    return TextReader(path, display, spans[:, 0] + skip, spans[:, 1] + skip, lines)


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Yield the character span of each element of the array that `text` is."""
    decoder = json.JSONDecoder()
    place = _skip_space(text, _skip_space(text, 0) + 1)
    if text[place : place + 1] != "]":
        while True:
            _, end = decoder.raw_decode(text, place)
            yield place, end
            place = _skip_space(text, end)
            if text[place : place + 1] != ",":
                break
            place = _skip_space(text, place + 1)
    if text[place : place + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if _skip_space(text, place + 1) < len(text):
        raise json.JSONDecodeError("Extra data behind the array", text, place + 1)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _byte_offsets(text: str, spans: Offsets) -> Offsets:
    """Turn character spans into UTF-8 byte spans, in one pass over the text."""
    flat, done, size = [], 0, 0
    for place in spans.ravel().tolist():
        size += len(text[done:place].encode())
        done = place
        flat.append(size)
    return np.array(flat, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class ParquetReader:
    """Rows of a Parquet file; `group_ends` int64 (groups,) counts rows up to each group's end."""

    path: Path
    display: str
    group_ends: Offsets

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.group_ends[-1])

    def where(self, row: int) -> str:
        """Return the row's file and number, from 1."""
        return f"{self.display}:{row + 1}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read the row groups that hold the rows, and take the rows from them."""
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.searchsorted(self.group_ends, wanted, side="right")
        found: list[DataRow | DataError] = [{}] * len(wanted)
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            first = int(self.group_ends[group - 1]) if group else 0
            table = _row_group(str(self.path), self.path.stat().st_mtime_ns, int(group))
            taken = table.take(wanted[places] - first).to_pylist()
            for place, row in zip(places, taken, strict=True):
                found[place] = row
        return found


@functools.lru_cache(maxsize=GROUPS_KEPT)
def _row_group(path: str, _changed_ns: int, group: int) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} cannot be read ({error})") from None


def _open_parquet(path: Path, display: str) -> ParquetReader:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{display}: not a Parquet file ({reason}); copy it again") from None
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not sum(sizes):
        raise DataError(f"{display}: no rows; write rows into it")
    return ParquetReader(path, display, np.cumsum(sizes, dtype=np.int64))
