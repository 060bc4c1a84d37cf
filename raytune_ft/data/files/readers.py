"""Readers: any row of one file by its number, without reading what stands before it.

Text files (JSON, JSON lines, CSV, plain text) are kept as byte ranges, 16 bytes a row; Parquet and
Arrow files by groups of rows. A reader travels to data tasks as its path and these numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from raytune_ft.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
"""A longer row is a mistake, such as a file without line breaks."""
CHUNK_ROWS = 1024
"""Rows of a text file that stay together where all rows are too many to be shuffled at once."""
CHUNK_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"
ADVICE = "correct it, or leave it out with data.on_error: skip"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Offsets = npt.NDArray[np.int64]
DataRow = dict[str, Any]


class Reader(Protocol):
    """Rows of one file."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def chunk_ends(self) -> Offsets:
        """Return where chunks of rows end, int64 (chunks,): rows of a chunk are read together."""
        ...

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read rows by number, each as its columns or as what is wrong with it."""
        ...

    def where(self, row: int) -> str:
        """Return the row's place, `file.jsonl:12`."""
        ...


@dataclass(frozen=True)
class TextReader(ABC):
    """Rows as byte ranges; `starts`, `ends`, `lines` (from 1) are int64 of shape (rows,)."""

    path: Path
    display: str
    starts: Offsets
    ends: Offsets
    lines: Offsets

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts)

    def chunk_ends(self) -> Offsets:
        """Return where chunks of CHUNK_ROWS rows end, int64 (chunks,)."""
        return even_chunks(len(self))

    def where(self, row: int) -> str:
        """Return the row's file and line."""
        return f"{self.display}:{self.lines[row]}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Seek to each row and parse it."""
        with self.path.open("rb") as file:
            return [self._read_one(file, row) for row in rows]

    @abstractmethod
    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one row; DataError says what it is instead."""

    def _read_one(self, file: BinaryIO, row: int) -> DataRow | DataError:
        where, start = self.where(row), int(self.starts[row])
        size = int(self.ends[row]) - start
        if size > MAX_ROW_BYTES:
            return DataError(
                f"{where}: one row of {size / 2**20:.0f} MiB, at most {MAX_ROW_BYTES // 2**20} "
                "are read; give each row a line of its own"
            )
        file.seek(start)
        try:
            return self.parse(file.read(size), where)
        except DataError as error:
            return error


def even_chunks(n_rows: int) -> Offsets:
    """Return where chunks of CHUNK_ROWS rows end, int64 (chunks,)."""
    ends = np.arange(CHUNK_ROWS, n_rows + CHUNK_ROWS, CHUNK_ROWS, dtype=np.int64)
    return np.minimum(ends, n_rows)


def decode(raw: bytes, where: str) -> str:
    """Decode a row's bytes; DataError for NUL bytes and what is not UTF-8."""
    if b"\0" in raw:
        raise DataError(f"{where}: holds NUL bytes, the file is damaged; {ADVICE}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; {ADVICE}") from None


def text_start(path: Path, display: str) -> bytes:
    """Return a text file's first bytes; DataError if it is empty or in another encoding."""
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise DataError(f"{display}: the file is empty; remove it or write rows into it")
    if start.startswith(_UTF16):
        raise DataError(f"{display}: the text is UTF-16; save it as UTF-8")
    return start


def line_spans(path: Path, skip: int) -> tuple[Offsets, Offsets, npt.NDArray[np.bool_]]:
    """Find the lines of a file in one pass.

    Args:
        path: a text file.
        skip: bytes before the first line.

    Returns:
        starts and ends (without the line break), int64, and which lines hold more than spaces,
        all of shape (lines,).
    """
    offset = 0
    breaks: list[Offsets] = []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
        ends = np.concatenate([*breaks, [offset]]).astype(np.int64)
        starts = np.concatenate([[skip], ends[:-1] + 1]).astype(np.int64)
        filled = ends > starts
        for line in np.flatnonzero(filled & (ends - starts < 16)):  # it may be all spaces
            file.seek(int(starts[line]))
            filled[line] = bool(file.read(int(ends[line] - starts[line])).strip())
    return starts, ends, filled
