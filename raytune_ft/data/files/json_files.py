"""JSON files: lines of objects, an array of them, or an object with one such array inside."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.data.files.readers import (
    ADVICE,
    BOM,
    DataRow,
    Offsets,
    TextReader,
    decode,
    line_spans,
    text_start,
)
from raytune_ft.data.rows.columns import describe
from raytune_ft.errors import DataError

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_ROW_LISTS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen"}
"""Lists that belong to one row, so that an object with one of them is a row."""


class JsonReader(TextReader):
    """Rows that are JSON objects."""

    def where(self, row: int) -> str:
        """Return the row's file and line, and its number where several stand on one line."""
        place, line = super().where(row), self.lines[row]
        around = self.lines[max(row - 1, 0) : row + 2]
        return f"{place} (row {row + 1})" if (around == line).sum() > 1 else place

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Parse one JSON object; DataError says what it is instead."""
        text = decode(raw, where)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({_reason(error)}); {ADVICE}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not usable JSON ({error}); {ADVICE}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: the row is {describe(row)}, not an object; {ADVICE}")
        return row


def open_jsonl(path: Path, display: str) -> JsonReader:
    """Find the lines of a file; DataError if it has none."""
    start = text_start(path, display)
    skip = len(BOM) if start.startswith(BOM) else 0
    starts, ends, filled = line_spans(path, skip)
    if not filled.any():
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
    return JsonReader(path, display, starts[filled], ends[filled], np.flatnonzero(filled) + 1)


def open_json(path: Path, display: str) -> JsonReader:
    """Find the rows of a JSON file of any of the three shapes.

    Raises:
        DataError: names the line where the JSON breaks, or the keys of an object without rows.
    """
    start = text_start(path, display)
    skip = len(BOM) if start.startswith(BOM) else 0
    first = start[skip:].lstrip()[:1]
    if first == b"[" or (first == b"{" and not _is_lines(path, skip)):
        return _index(path.read_bytes()[skip:], skip, path, display)
    return open_jsonl(path, display)


def _is_lines(path: Path, skip: int) -> bool:
    """Tell whether a file's first line is a row of its own, rather than a part of one object."""
    with path.open("rb") as file:
        file.seek(skip)
        line = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        # with one object per line, the second line opens one too
        return more and line.rstrip().endswith(b"}")
    return more or not (isinstance(value, dict) and _row_list(value))


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


def _index(raw: bytes, skip: int, path: Path, display: str) -> JsonReader:
    """Find the rows in the text of one JSON value."""
    if b"\0" in raw:
        raise DataError(f"{display}: holds NUL bytes, the file is damaged; copy it again")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{display}:{line}: not UTF-8; save the file as UTF-8") from None
    try:
        spans = np.array(list(_rows(text, display)), dtype=np.int64).reshape(-1, 2)
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
    return JsonReader(path, display, spans[:, 0] + skip, spans[:, 1] + skip, lines)


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
    if _skip_space(text, end) < len(text):
        raise json.JSONDecodeError("Extra data behind the rows", text, end)


def _elements(text: str, start: int) -> Generator[tuple[int, int], None, int]:
    """Yield the character span of each element of the array at `start`; return its end."""
    place = _skip_space(text, start + 1)
    if text[place : place + 1] != "]":
        while True:
            _, end = _DECODER.raw_decode(text, place)
            yield place, end
            place = _skip_space(text, end)
            if text[place : place + 1] != ",":
                break
            place = _skip_space(text, place + 1)
    if text[place : place + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    return place + 1


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
