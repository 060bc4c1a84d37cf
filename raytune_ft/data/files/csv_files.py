"""CSV and TSV files: the first record names the columns, every later one is a row of texts.

Quoting is RFC 4180's, as Python's `csv` reads it: a quoted field may hold separators, line breaks
and doubled quotes. An empty field is the empty text.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raytune_ft.data.files import readers
from raytune_ft.data.files.blobs import Blob
from raytune_ft.data.files.blocks import PARSED_ROWS, BlockBuilder, Blocks
from raytune_ft.data.files.readers import ADVICE, DataRow, Part, TextReader, decode, text_start
from raytune_ft.data.files.text_index import index_text
from raytune_ft.errors import DataError

_BATCH = 65_536


class _Record(NamedTuple):
    """A record with its place in the text, and the line in which it begins, from 1."""

    start: int
    end: int
    line: int
    fields: list[str]


class _RecordError(ValueError):
    """A record that cannot be read, and the line in which it begins."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class CsvReader(TextReader):
    """Rows of separated values."""

    columns: tuple[str, ...]
    separator: str

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one record; DataError if it has other fields than the columns."""
        text = decode(raw, where)
        try:
            fields = next(_records(io.StringIO(text, newline=""), self.separator))
        except (csv.Error, StopIteration) as error:
            raise DataError(f"{where}: not a readable record ({error}); {ADVICE}") from None
        if len(fields) != len(self.columns):
            raise DataError(
                f"{where}: {len(fields)} fields, {len(self.columns)} columns "
                f"({', '.join(self.columns)}); put texts with separators into quotes, or "
                "leave the row out with data.on_error: skip"
            )
        return dict(zip(self.columns, fields, strict=True))

    def divide(self, raw: bytes) -> list[Part]:
        """Divide a block into its records."""
        records = _index(io.BytesIO(raw), 0, self.separator)
        return [(raw[record.start : record.end], record.line - 1) for record in records]


def open_csv(blob: Blob, display: str, separator: str | None = None) -> CsvReader:
    """Find the records of a file in one pass.

    Args:
        blob: the file.
        display: its name in messages.
        separator: between fields; None: a comma, or what a header without commas has instead
            (semicolon or tab).

    Raises:
        DataError: no header, no rows, or quotes that do not close.
    """
    start, skip = text_start(blob, display)
    mark = separator or _separator(start[skip:])

    def divide(chunks: Iterator[bytes]) -> tuple[Blocks, int]:
        try:
            return _divide(_index(_lines(chunks), skip, mark), blob.size, display), 0
        except _RecordError as error:
            raise DataError(
                f"{display}:{error.line}: the record that begins here cannot be read ({error}); "
                "close its quotes, and double those inside quoted texts"
            ) from None

    index = index_text(blob, display, f"csv {mark}", skip, divide)
    header = next(_index(_lines(blob.chunks(skip)), skip, mark))
    columns = _header(header, display)
    return CsvReader(blob, display, index.version, index.fingerprint, index.blocks, columns, mark)


def _divide(records: Iterator[_Record], end: int, display: str) -> Blocks:
    """Find blocks of the rows behind the header."""
    header = next(records, None)
    if header is not None:
        _header(header, display)
    builder, n_rows = BlockBuilder(PARSED_ROWS), 0
    while places := [(record.start, record.line) for record in itertools.islice(records, _BATCH)]:
        found = np.array(places, dtype=np.int64)
        builder.add(found[:, 0], found[:, 1])
        n_rows += len(places)
    if header is not None and not n_rows:
        raise DataError(f"{display}: only a header, no rows; write rows into it")
    return builder.finish(end)


def _separator(start: bytes) -> str:
    header = start.partition(b"\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark.encode() in header), ",")


def _header(record: _Record, display: str) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in record.fields)
    try:
        "".join(columns).encode()
    except UnicodeEncodeError:
        raise DataError(f"{display}:{record.line}: not UTF-8; save the file as UTF-8") from None
    unnamed = [number for number, name in enumerate(columns, start=1) if not name]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if unnamed or twice:
        what = f"column '{twice[0]}' twice" if twice else f"column {unnamed[0]} without a name"
        raise DataError(f"{display}:{record.line}: the header has {what}; name each column")
    return columns


def _records(lines: Iterator[str] | io.StringIO, separator: str) -> Iterator[list[str]]:
    """Parse records, with fields as long as a row may be."""
    if csv.field_size_limit() < readers.MAX_ROW_BYTES:
        csv.field_size_limit(readers.MAX_ROW_BYTES)  # the module knows but one limit for all
    return csv.reader(lines, delimiter=separator, strict=True)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a text with their line breaks; one over the limit without its end."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > readers.MAX_ROW_BYTES:
            break
    if rest:
        yield rest


def _index(lines: Iterable[bytes], skip: int, separator: str) -> Iterator[_Record]:
    """Yield each record that is not blank.

    Raises:
        _RecordError: the quotes of a record are wrong, or a line is too long.
    """
    done, line = skip, 0

    def decoded() -> Iterator[str]:
        nonlocal done, line
        for raw in lines:
            if len(raw) > readers.MAX_ROW_BYTES:
                raise csv.Error(f"a line of over {readers.MAX_ROW_BYTES // 2**20} MiB")
            done, line = done + len(raw), line + 1
            # other encodings are told when the row is read; the separators are ASCII
            yield raw.decode("utf-8", "surrogateescape")

    start, first = skip, 1
    try:
        for fields in _records(decoded(), separator):
            if fields:
                yield _Record(start, done, first, fields)
            start, first = done, line + 1
    except csv.Error as error:
        raise _RecordError(first, str(error)) from None
