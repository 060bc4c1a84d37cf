"""Tools in rows, and calls of them: any of the usual spellings in, OpenAI's out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.data.rows.columns import OR_SKIP, Row, describe, from_json, list_in, text_in
from raytune_ft.errors import DataError

Tool = Mapping[str, Any]


def tools_of(row: Row, where: str) -> tuple[Tool, ...]:
    """Read the column `tools`: a list of JSON schemas, or its text; nothing if there is none.

    Returns:
        One `{"type": "function", "function": {"name": ..., ...}}` per tool.

    Raises:
        DataError: the column is no list of tools with names.
    """
    value = row.get("tools")
    if value is None or value == "":
        return ()
    where = f"{where}: column 'tools'"
    return tuple(
        _tool(item, f"{where}, tool {place}")
        for place, item in enumerate(list_in(value, where), start=1)
    )


def _tool(item: Mapping[str, Any], where: str) -> Tool:
    function = from_json(item.get("function", item))
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has no 'name'; correct the row, {OR_SKIP}")
    schema = dict(function)
    schema["parameters"] = from_json(schema.get("parameters") or {})
    return {"type": "function", "function": schema}


def calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """Read the calls of one answer: a list, one call, or the JSON text of either.

    Returns:
        One `{"type": "function", "function": {"name": ..., "arguments": ...}}` per call, with its
        `id` where it has one. Arguments that are the text of an object become the object, since
        chat templates write them as JSON themselves.

    Raises:
        DataError: a call is no object with a name.
    """
    value = from_json(value)
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not calls:
        raise DataError(
            f"{where} is {describe(value)}, not a tool call; correct the row, {OR_SKIP}"
        )
    return [_call(call, f"{where}, call {place}") for place, call in enumerate(calls, start=1)]


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"{where} is {describe(call)}, not an object; correct the row, {OR_SKIP}")
    function = call.get("function") or call
    if not isinstance(function, Mapping) or "name" not in function:
        raise DataError(f"{where} has no 'name'; correct the row, {OR_SKIP}")
    name = text_in(function["name"], f"{where}, 'name'")
    arguments = from_json(function.get("arguments", function.get("parameters")))
    if arguments is None or arguments == "":
        arguments = {}
    known = {"id": call["id"]} if call.get("id") else {}
    return {**known, "type": "function", "function": {"name": name, "arguments": arguments}}
