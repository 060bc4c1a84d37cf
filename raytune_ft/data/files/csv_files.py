"""CSV and TSV files: the first record names the columns, every later one is a row of texts.

Quoting is RFC 4180's, as Python's `csv` reads it: a quoted field may hold separators, line breaks
and doubled quotes. An empty field is the empty text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from raytune_ft.data.files import readers
from raytune_ft.data.files.blobs import Blob
from raytune_ft.data.files.blocks import PARSED_ROWS, BlockBuilder, Blocks
from raytune_ft.data.files.csv_records import RecordError, read_records, record_starts
from raytune_ft.data.files.readers import ADVICE, DataRow, Part, TextReader, decode, text_start
from raytune_ft.data.files.text_index import index_text
from raytune_ft.errors import DataError


class _Record(NamedTuple):
    """A record with its place in the text, and the line in which it begins, from 1."""

    start: int
    end: int
    line: int
    fields: list[str]


@dataclass(frozen=True)
class CsvReader(TextReader):
    """Rows of separated values."""

    columns: tuple[str, ...]
    separator: str

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one record; DataError if it has other fields than the columns."""
        text = decode(raw, where)
        try:
            fields = next(read_records(io.StringIO(text, newline=""), self.separator))
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
        builder, n_records = BlockBuilder(PARSED_ROWS), 0
        for starts, lines in record_starts(chunks, skip, mark):
            header = 0 if n_records else 1
            n_records += len(starts)
            builder.add(starts[header:], lines[header:])
        if n_records < 2:
            raise DataError(f"{display}: only a header, no rows; write rows into it")
        return builder.finish(blob.size), 0

    try:
        header = next(_index(_lines(blob.chunks(skip)), skip, mark), None)
        columns = _header(header, display)
        index = index_text(blob, display, f"csv {mark}", skip, divide)
    except RecordError as error:
        raise DataError(
            f"{display}:{error.line}: the record that begins here cannot be read ({error}); "
            "close its quotes, and double those inside quoted texts"
        ) from None
    return CsvReader(blob, display, index.version, index.fingerprint, index.blocks, columns, mark)


def _separator(start: bytes) -> str:
    header = start.partition(b"\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark.encode() in header), ",")


def _header(record: _Record | None, display: str) -> tuple[str, ...]:
    if record is None:
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
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
        RecordError: the quotes of a record are wrong, or a line is too long.
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
        for fields in read_records(decoded(), separator):
            if fields:
                yield _Record(start, done, first, fields)
            start, first = done, line + 1
    except csv.Error as error:
        raise RecordError(first, str(error)) from None
