"""Readers: any row of one file by its number, without reading what stands before it.

Text files (JSON, JSON lines, CSV, plain text) are known by blocks of rows, about a byte a row;
Parquet and Arrow files by groups of rows. A reader travels to data tasks as its blob and these
numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from raytune_ft.data.files.blobs import Blob, LocalBlob
from raytune_ft.data.files.blocks import Blocks
from raytune_ft.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
"""A longer row is a mistake, such as a file without line breaks."""
CHUNK_ROWS = 1024
"""Rows of a text file that stay together where all rows are too many to be shuffled at once."""
READ_BYTES = 32 * 2**20
"""Bytes of blocks that are held at once, unless a single row has more."""
BOM = b"\xef\xbb\xbf"
ADVICE = "correct it, or leave it out with data.on_error: skip"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_NO_TEXT = {
    b"\x1f\x8b": ("a gzip file", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "add .zst to its name"),
    b"BZh91AY&SY": ("a bzip2 file", "add .bz2 to its name"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1\x15": ("a Parquet file", "end its name in .parquet"),
    b"ARROW1\0\0": ("an Arrow file", "end its name in .arrow"),
}
"""First bytes of files that are no text -> what they are, and what to do."""
_KNOWN_BLOCKS = 8192

Offsets = npt.NDArray[np.int64]
DataRow = dict[str, Any]


class Reader(Protocol):
    """Rows of one file."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells these rows from others, wherever the file lies; as the reader was opened."""
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

    def places(self, rows: Sequence[int]) -> list[str]:
        """Return the places of rows."""
        ...

    def check_unchanged(self) -> None:
        """Raise DataError if the file is not as it was when the reader was opened."""
        ...

    def local_file(self) -> str | None:
        """Return the path of a file that only this machine is known to have; None if others do."""
        ...


@dataclass(frozen=True)
class FileReader(ABC):
    """What readers of one file have in common.

    `version` is the blob's when the file was opened; `fingerprint` is the content's hash, or what
    stands for it.
    """

    blob: Blob
    display: str
    version: str
    fingerprint: str

    @abstractmethod
    def where(self, row: int) -> str:
        """Return the row's place."""

    def places(self, rows: Sequence[int]) -> list[str]:
        """Return the places of rows."""
        return [self.where(row) for row in rows]

    def check_unchanged(self) -> None:
        """Raise DataError if the file is not as it was when the reader was opened."""
        try:
            changed = self.blob.version != self.version
        except OSError:
            changed = True
        if changed:
            raise self.changed()

    def changed(self) -> DataError:
        """Return what there is to say of a file that is not as it was."""
        return DataError(
            f"{self.display}: changed since the run began; put the file back as it was, or start "
            "a new run"
        )

    def local_file(self) -> str | None:
        """Return the path of a file of this machine."""
        return self.blob.place if isinstance(self.blob, LocalBlob) else None


Part = tuple[bytes, int]
"""A row's bytes, and the line breaks before it in its block."""


@dataclass(frozen=True)
class TextReader(FileReader):
    """Rows as parts of a text."""

    blocks: Blocks
    own_lines: ClassVar[bool] = True
    """Whether no two rows stand on the same line."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.blocks.n_rows

    def chunk_ends(self) -> Offsets:
        """Return where chunks of CHUNK_ROWS rows end, int64 (chunks,)."""
        return even_chunks(len(self))

    def where(self, row: int) -> str:
        """Return the row's file and line."""
        return f"{self.display}:{self.line_of(row)}"

    def places(self, rows: Sequence[int]) -> list[str]:
        """Return the rows' files and lines."""
        wanted = np.asarray(rows, dtype=np.int64)
        blocks, places = self.blocks.find_all(wanted)
        firsts, evens = self.blocks.lines_of_all(blocks)
        if not self.own_lines or not evens.all():
            return super().places(rows)
        return [f"{self.display}:{line}" for line in (firsts + places).tolist()]

    def line_of(self, row: int) -> int:
        """Return the line in which a row begins, from 1."""
        block, place = self.blocks.find(row)
        first = self.blocks.lines_of(block)[0]
        if place == 0 or self._is_even(block):
            return first + place
        lines = _known_lines.get((self.blob.place, self.version, block))
        if lines is None:
            ((_, raw),) = self._bytes_of([block])
            lines = [line for _, line in self._rows_in(raw, block)]
        return first + lines[place]

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Read the blocks that hold the rows, and parse the rows.

        Raises:
            DataError: the file is not as it was when it was opened, or cannot be read.
        """
        self.check_unchanged()
        wanted = np.asarray(rows, dtype=np.int64)
        blocks, places = self.blocks.find_all(wanted)
        order = np.argsort(blocks, kind="stable")
        found: list[DataRow | DataError] = [{}] * len(wanted)
        firsts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
        groups = np.split(order, firsts[1:])
        for group, (block, raw) in zip(groups, self._pieces(blocks[order[firsts]]), strict=False):
            parts = self._rows_in(raw, block)
            for number in group.tolist():
                text, _ = parts[places[number]]
                found[number] = self._parsed(text, int(wanted[number]), block)
        return found

    @abstractmethod
    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one row; DataError says what it is instead."""

    @abstractmethod
    def divide(self, raw: bytes) -> list[Part]:
        """Divide a block's bytes into rows; ValueError if they cannot be told apart."""

    def _is_even(self, block: int) -> bool:
        """Tell whether a block's rows begin in lines that follow each other."""
        first, after = self.blocks.lines_of(block)
        return self.own_lines and after - first == self.blocks.rows_of(block)

    def _pieces(self, blocks: Offsets) -> Iterator[tuple[int, bytes]]:
        """Yield blocks with their bytes, a few blocks at a time."""
        batch: list[int] = []
        size = 0
        for block in blocks.tolist():
            start, end = self._span(block)
            if batch and size + end - start > READ_BYTES:
                yield from self._bytes_of(batch)
                batch, size = [], 0
            batch.append(block)
            size += end - start
        yield from self._bytes_of(batch)

    def _bytes_of(self, blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        joined: list[tuple[int, int]] = []
        for start, end in map(self._span, blocks):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        try:
            ranges = zip(joined, self.blob.read(joined), strict=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"{self.display}: cannot be read ({reason}); check the disk") from None
        (first, last), raw = next(ranges, ((0, 0), b""))
        for block in blocks:
            start, end = self._span(block)
            if start >= last:
                (first, last), raw = next(ranges)
            yield block, raw[start - first : end - first]

    def _span(self, block: int) -> tuple[int, int]:
        start, end = self.blocks.span(block)
        # a longer block is a single row: it is shown to be too long, or ends in blank lines
        return start, min(end, start + MAX_ROW_BYTES + 1)

    def _rows_in(self, raw: bytes, block: int) -> list[Part]:
        """Find the rows of a block; keep their lines where these are not to be computed."""
        if len(raw) > MAX_ROW_BYTES:
            return self._first(raw)
        try:
            parts = self.divide(raw)
        except ValueError:
            raise self.changed() from None
        if len(parts) != self.blocks.rows_of(block):
            raise self.changed()
        if not self._is_even(block):
            key = (self.blob.place, self.version, block)
            _known_lines[key] = [line for _, line in parts]
            if len(_known_lines) > _KNOWN_BLOCKS:
                _known_lines.popitem(last=False)
        return parts

    def _first(self, raw: bytes) -> list[Part]:
        try:
            return self.divide(raw)[:1]
        except ValueError:
            return [(raw, 0)]

    def _parsed(self, raw: bytes, row: int, block: int) -> DataRow | DataError:
        if len(raw) > MAX_ROW_BYTES:
            start, end = self.blocks.span(block)
            return too_long(self.where(row), end - start)
        try:
            return self.parse(raw, "")
        except DataError:
            pass
        try:  # only now: finding a row's place may cost more than reading it
            return self.parse(raw, self.where(row))
        except DataError as error:
            return error


_known_lines: OrderedDict[tuple[str, str, int], list[int]] = OrderedDict()
"""(place, version, block) -> lines before each row, of blocks that were read lately."""


def too_long(where: str, size_bytes: int) -> DataError:
    """Return what there is to say of a row over MAX_ROW_BYTES."""
    return DataError(
        f"{where}: one row of {size_bytes / 2**20:.0f} MiB, at most {MAX_ROW_BYTES // 2**20} are "
        "read; give each row a line of its own, or leave it out with data.on_error: skip"
    )


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


def text_start(blob: Blob, display: str) -> tuple[bytes, int]:
    """Return a text file's first bytes and how many of them are a byte order mark.

    Raises:
        DataError: it is empty, in another encoding or no text.
    """
    (start,) = blob.read([(0, 4096)])
    if not start:
        raise DataError(f"{display}: the file is empty; remove it or write rows into it")
    for first, (what, advice) in _NO_TEXT.items():
        if start.startswith(first):
            raise DataError(f"{display}: is {what}, not text; {advice}")
    # ASCII in UTF-16: every other byte is zero
    halves = [start[place:64:2] for place in (0, 1)]
    zeros = sorted(half.count(0) for half in halves)
    if start.startswith(_UTF16) or (zeros[0] == 0 and zeros[1] == len(halves[1]) > 0):
        raise DataError(f"{display}: the text is UTF-16; save it as UTF-8")
    return start, len(BOM) if start.startswith(BOM) else 0


def filled_parts(raw: bytes) -> list[Part]:
    """Divide a text into the lines that hold more than white space, without their line breaks."""
    lines = enumerate(raw.split(b"\n"))
    return [(text, line) for line, text in lines if text and not text.isspace()]
