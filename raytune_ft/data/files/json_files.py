"""JSON files: lines of objects, an array of them, or an object with one such array inside."""

from __future__ import annotations

import io
import itertools
import json
from abc import ABC
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from raytune_ft.data.files.blobs import Blob, BlobFile
from raytune_ft.data.files.blocks import PARSED_ROWS, BlockBuilder, Blocks, filled_lines
from raytune_ft.data.files.readers import (
    ADVICE,
    MAX_ROW_BYTES,
    DataRow,
    Offsets,
    Part,
    TextReader,
    decode,
    filled_parts,
    text_start,
)
from raytune_ft.data.files.text_index import index_text
from raytune_ft.data.rows.columns import describe, shown
from raytune_ft.errors import DataError

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_ROW_LISTS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen"}
"""Lists that belong to one row, so that an object with one of them is a row."""


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; ValueError for a key that stands there twice: one value would be lost."""
    found = dict(members)
    if len(found) < len(members):
        ((twice, _),) = Counter(key for key, _ in members).most_common(1)
        raise ValueError(f"key '{shown(twice)}' stands in one object twice")
    return found


_ROW_DECODER = json.JSONDecoder(object_pairs_hook=_once)
MAX_VALUE_BYTES = 512 * 2**20
"""A file of one JSON value is parsed as a whole, once."""


@dataclass(frozen=True)
class JsonReader(TextReader, ABC):
    """Rows that are JSON objects."""

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one JSON object; DataError says what it is instead."""
        text = decode(raw, where)
        try:
            row = _ROW_DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({_reason(error)}); {ADVICE}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not usable JSON ({error}); {ADVICE}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: the row is {describe(row)}, not an object; {ADVICE}")
        return row


class LineReader(JsonReader):
    """Rows that are lines."""

    def divide(self, raw: bytes) -> list[Part]:
        """Divide a block at its line breaks."""
        return filled_parts(raw)


class ElementReader(JsonReader):
    """Rows inside of one JSON value."""

    own_lines: ClassVar[bool] = False

    def where(self, row: int) -> str:
        """Return the row's file and line, and its number where several stand on one line."""
        line = self.line_of(row)
        around = [n for n in (row - 1, row + 1) if 0 <= n < len(self)]
        place = f"{self.display}:{line}"
        return f"{place} (row {row + 1})" if line in map(self.line_of, around) else place

    def divide(self, raw: bytes) -> list[Part]:
        """Divide a part of an array that begins with an element."""
        text = raw.rstrip(b" \t\r\n,").decode()
        return [
            (text[start:end].encode(), text.count("\n", 0, start))
            for start, end in _elements_from(text, 0)
        ]


def open_jsonl(blob: Blob, display: str) -> LineReader:
    """Find the lines of a file; DataError if it has none."""
    _, skip = text_start(blob, display)

    def divide(chunks: Iterator[bytes]) -> tuple[Blocks, int]:
        builder = BlockBuilder()
        for starts, lines in filled_lines(chunks, skip):
            builder.add(starts, lines)
        return builder.finish(blob.size), 0

    index = index_text(blob, display, "lines", skip, divide)
    return LineReader(blob, display, index.version, index.fingerprint, index.blocks)


def open_json(blob: Blob, display: str) -> JsonReader:
    """Find the rows of a JSON file of any of the three shapes.

    Raises:
        DataError: names the line where the JSON breaks, or the keys of an object without rows;
            or the file is one value of over MAX_VALUE_BYTES.
    """
    start, skip = text_start(blob, display)
    first = start[skip:].lstrip()[:1]
    if first != b"[" and (first != b"{" or _is_lines(blob, skip)):
        return open_jsonl(blob, display)
    if blob.size > MAX_VALUE_BYTES:
        raise DataError(
            f"{display}: one JSON value of {blob.size / 2**30:.1f} GiB, at most "
            f"{MAX_VALUE_BYTES / 2**30:.1f} are read; write it as JSON lines (.jsonl), one row "
            "per line"
        )

    def divide(chunks: Iterator[bytes]) -> tuple[Blocks, int]:
        raw = bytearray()
        for chunk in chunks:
            raw += chunk
        return _divide(raw, skip, display), 0

    index = index_text(blob, display, "value", skip, divide)
    return ElementReader(blob, display, index.version, index.fingerprint, index.blocks)


def _is_lines(blob: Blob, skip: int) -> bool:
    """Tell whether a file's first line is a row of its own, rather than a part of one object."""
    filled = (line for line in _lines(blob, skip) if not line.isspace())
    line = next(filled, b"")
    more = next(filled, None) is not None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        # with one object per line, the second line opens one too
        return more and line.rstrip().endswith(b"}")
    return more or not (isinstance(value, dict) and _row_list(value))


def _lines(blob: Blob, skip: int) -> Iterator[bytes]:
    """Yield lines, those that are too long in pieces."""
    with io.BufferedReader(BlobFile(blob), 2**20) as file:
        file.seek(skip)
        while line := file.readline(MAX_ROW_BYTES + 1):
            yield line


def _row_list(members: dict[str, Any]) -> str | None:
    """Return the only key of an object whose value is a list of rows; None if there is none."""
    if _ROW_LISTS & members.keys():
        return None
    lists = [
        key
        for key, value in members.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    return lists[0] if len(lists) == 1 else None


def _is_row(members: dict[str, Any]) -> bool:
    """Tell an object that is a row itself from one of columns, or of rows by name."""
    if _ROW_LISTS & members.keys():
        return True
    return any(not isinstance(value, list | dict) for value in members.values())


def _divide(raw: bytearray, skip: int, display: str) -> Blocks:
    """Find the rows in the text of one JSON value, which begins at byte `skip` of its file."""
    if b"\0" in raw:
        raise DataError(f"{display}: holds NUL bytes, the file is damaged; copy it again")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{display}:{line}: not UTF-8; save the file as UTF-8") from None
    try:
        flat = itertools.chain.from_iterable(_rows(text, display))
        spans = np.fromiter(flat, dtype=np.int64).reshape(-1, 2)
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
    builder = BlockBuilder(PARSED_ROWS)
    builder.add(spans[:, 0] + skip, np.searchsorted(breaks, spans[:, 0]) + 1)
    return builder.finish(int(spans[-1, 1]) + skip)


def _rows(text: str, display: str) -> Iterator[tuple[int, int]]:
    """Yield the character span of each row in the text of an array or an object."""
    start = _skip_space(text, 0)
    if text[start] == "[":
        end = yield from _elements(text, start)
    else:
        values, starts, end = _members(text, start)
        key = _row_list(values)
        if key is not None:
            yield from _elements(text, starts[key])
        elif _is_row(values):
            yield start, end
        else:
            raise DataError(
                f"{display}: an object of {', '.join(values) or 'nothing'}, not of one list of "
                "rows; write a list of objects, or one object per line"
            )
    more = _skip_space(text, end)
    if more < len(text):
        raise json.JSONDecodeError("Extra data behind the rows", text, more)


def _elements(text: str, start: int) -> Generator[tuple[int, int], None, int]:
    """Yield the character span of each element of the array at `start`; return its end."""
    place = _skip_space(text, start + 1)
    if text[place : place + 1] != "]":
        place = yield from _elements_from(text, place)
    if text[place : place + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    return place + 1


def _elements_from(text: str, place: int) -> Generator[tuple[int, int], None, int]:
    """Yield the character span of each element from `place` on; return where no comma follows."""
    while True:
        _, end = _DECODER.raw_decode(text, place)
        yield place, end
        place = _skip_space(text, end)
        if text[place : place + 1] != ",":
            return place
        place = _skip_space(text, place + 1)


def _members(text: str, start: int) -> tuple[dict[str, Any], dict[str, int], int]:
    """Read the object at `start`: its values, where each begins, and the object's end."""
    values, spans = dict[str, Any](), dict[str, int]()
    place = _skip_space(text, start + 1)
    while text[place : place + 1] == '"':
        key, place = _DECODER.raw_decode(text, place)
        place = _skip_space(text, place)
        if text[place : place + 1] != ":":
            raise json.JSONDecodeError("Expecting ':'", text, place)
        spans[key] = _skip_space(text, place + 1)
        values[key], place = _DECODER.raw_decode(text, spans[key])
        place = _skip_space(text, place)
        if text[place : place + 1] != ",":
            break
        place = _skip_space(text, place + 1)
    if text[place : place + 1] != "}":
        raise json.JSONDecodeError("Expecting ',' or '}'", text, place)
    return values, spans, place + 1


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


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg} at column {error.colno}"
