"""CSV and TSV files: the first record names the columns, every later one is a row of texts.

Quoting is RFC 4180's, as Python's `csv` reads it: a quoted field may hold separators, line breaks
and doubled quotes. An empty field is the empty text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytune_ft.data.files import readers
from raytune_ft.data.files.readers import ADVICE, BOM, DataRow, TextReader, decode, text_start
from raytune_ft.errors import DataError


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


def open_csv(path: Path, display: str, separator: str | None = None) -> CsvReader:
    """Find the records of a file in one pass; 24 bytes are kept per row.

    Args:
        path: the file.
        display: its name in messages.
        separator: between fields; None: a comma, or what a header without commas has instead
            (semicolon or tab).

    Raises:
        DataError: no header, no rows, or quotes that do not close.
    """
    start = text_start(path, display)
    skip = len(BOM) if start.startswith(BOM) else 0
    separator = separator or _separator(start[skip:])
    records = _index(path, display, skip, separator)
    columns = _header(next(records, None), display)
    found = np.array([span for span, _ in records], dtype=np.int64).reshape(-1, 3)
    if not len(found):
        raise DataError(f"{display}: only a header, no rows; write rows into it")
    return CsvReader(path, display, found[:, 0], found[:, 1], found[:, 2], columns, separator)


def _separator(start: bytes) -> str:
    header = start.partition(b"\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark.encode() in header), ",")


def _header(record: tuple[tuple[int, int, int], list[str]] | None, display: str) -> tuple[str, ...]:
    if record is None:
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
    columns = tuple(name.strip() for name in record[1])
    try:
        "".join(columns).encode()
    except UnicodeEncodeError:
        raise DataError(f"{display}:{record[0][2]}: not UTF-8; save the file as UTF-8") from None
    unnamed = [number for number, name in enumerate(columns, start=1) if not name]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if unnamed or twice:
        what = f"column '{twice[0]}' twice" if twice else f"column {unnamed[0]} without a name"
        raise DataError(f"{display}:{record[0][2]}: the header has {what}; name each column")
    return columns


def _records(lines: Iterator[str] | io.StringIO, separator: str) -> Iterator[list[str]]:
    """Parse records, with fields as long as a row may be."""
    if csv.field_size_limit() < readers.MAX_ROW_BYTES:
        csv.field_size_limit(readers.MAX_ROW_BYTES)  # the module knows but one limit for all
    return csv.reader(lines, delimiter=separator, strict=True)


def _index(
    path: Path, display: str, skip: int, separator: str
) -> Iterator[tuple[tuple[int, int, int], list[str]]]:
    """Yield ((start, end, line from 1), fields) of each record that is not blank."""
    done, line = skip, 0

    def lines() -> Iterator[str]:
        nonlocal done, line
        with path.open("rb") as file:
            file.seek(skip)
            while raw := file.readline(readers.MAX_ROW_BYTES + 1):
                if len(raw) > readers.MAX_ROW_BYTES:
                    raise csv.Error(f"a line of over {readers.MAX_ROW_BYTES // 2**20} MiB")
                done, line = done + len(raw), line + 1
                # other encodings are told when the row is read; the separators are ASCII
                yield raw.decode("utf-8", "surrogateescape")

    start, first = skip, 1
    try:
        for fields in _records(lines(), separator):
            if fields:
                yield (start, done, first), fields
            start, first = done, line + 1
    except csv.Error as error:
        raise DataError(
            f"{display}:{first}: the record that begins here cannot be read ({error}); close its "
            "quotes, and double those inside quoted texts"
        ) from None
