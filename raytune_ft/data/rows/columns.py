"""Columns: checked access to the values of one row, and the errors for wrong ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from raytune_ft.errors import DataError

Row = Mapping[str, Any]

OR_SKIP = "or leave the row out with data.on_error: skip"
_SHOWN_CHARACTERS = 60
_SHOWN_NAMES = 20


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Give a row's columns the names that its format expects.

    Args:
        row: columns by their own names.
        columns: expected name -> own name, as `data.sources[].columns`.
    """
    if not columns:
        return row
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return {**kept, **{name: row[own] for name, own in columns.items() if own in row}}


def column_of(row: Row, column: str, where: str) -> Any:
    """Return a column's value; DataError if the row has no such column."""
    if column in row:
        return row[column]
    raise DataError(
        f"{where}: no column '{column}'; columns: {names(row)}; "
        f"choose another data.sources[].map, name the column in data.sources[].columns, {OR_SKIP}"
    )


def text_of(row: Row, column: str, where: str) -> str:
    """Return a column's text; DataError if it is missing or no text."""
    return text_in(column_of(row, column, where), f"{where}: column '{column}'")


def optional_text(row: Row, column: str, where: str) -> str:
    """Return a column's text, the empty text for null; DataError as `text_of`."""
    value = column_of(row, column, where)
    return "" if value is None else text_in(value, f"{where}: column '{column}'")


def text_if_any(row: Row, column: str, where: str) -> str:
    """Return a column's text, the empty text for null or no such column; DataError for others."""
    return "" if row.get(column) is None else text_of(row, column, where)


def text_in(value: Any, where: str) -> str:
    """Return `value` if it is a text; DataError otherwise."""
    if isinstance(value, str):
        return value
    raise DataError(
        f"{where} is {describe(value)}, not text; "
        "correct the row, or leave it out with data.on_error: skip"
    )


def list_in(value: Any, where: str) -> list[Mapping[str, Any]]:
    """Return `value` if it is a list of objects, or the JSON text of one; DataError otherwise."""
    value = from_json(value)
    if not isinstance(value, list):
        raise DataError(
            f"{where} is {describe(value)}, not a list of messages; "
            "choose another data.sources[].map, or leave it out with data.on_error: skip"
        )
    for place, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}, item {place} is {describe(item)}, not an object; "
                "correct the row, or leave it out with data.on_error: skip"
            )
    return value


def from_json(value: Any) -> Any:
    """Parse the text of a JSON list or object, as CSV columns hold them; return others as given."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def shown(text: object) -> str:
    """Write what a row holds so that it can stand in a message: short, on one line, harmless."""
    whole = str(text)
    start = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in whole[:_SHOWN_CHARACTERS]
    )
    return f"{start}..." if len(whole) > _SHOWN_CHARACTERS else start


def names(keys: Iterable[object]) -> str:
    """List the names of columns or keys for a message; `none` if there are none."""
    known = list(keys)
    more = [f"and {len(known) - _SHOWN_NAMES} more"] if len(known) > _SHOWN_NAMES else []
    return ", ".join([*map(shown, known[:_SHOWN_NAMES]), *more]) or "none"


def check_texts(value: Any, where: str) -> None:
    """Raise DataError if some text inside of a JSON value cannot be tokenised."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            check_text(found, where)
        elif isinstance(found, Mapping):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list):
            waiting += found


def check_text(text: str, where: str) -> None:
    """Raise DataError for text that no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character at place {error.start} (an unpaired surrogate); "
            "correct the row, or leave it out with data.on_error: skip"
        ) from None


def describe(value: Any) -> str:
    """Name a JSON value's kind for an error message: `null`, `a list`, `the number 3`."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{'the value' if isinstance(value, bool) else 'the number'} {shown(value)}"
    names = {"str": "text", "list": "a list", "dict": "an object"}
    kind = type(value).__name__
    return names.get(kind, f"a {kind}")
