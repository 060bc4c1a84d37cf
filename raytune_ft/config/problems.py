"""Pydantic's findings, in plain words with the file and line."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from raytune_ft.config.document import KeyPath, dotted, in_words, nearest
from raytune_ft.config.schema import Recipe

Where = Callable[[KeyPath], str]
"""Gives the place of a key: `my.yaml:7` or `argument`."""

_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list: [...]",
    "tuple_type": "a list: [...]",
    "dict_type": "keys with values",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("or more", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("or less", "le"),
}


def explain(
    error: ValidationError, content: Any, where: Where, told: Collection[KeyPath] = ()
) -> list[str]:
    """Return one line per wrong key, but for those in `told`; a union's members are one line."""
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path, missing = _real_path(detail["loc"], content)
        whole = (*path, *missing)
        if not any(whole[:end] in told for end in range(1, len(whole) + 1)):
            found.setdefault(whole, []).append(detail)
    return [_line(path, details, content, where) for path, details in found.items()]


def _real_path(loc: tuple[str | int, ...], content: Any) -> tuple[KeyPath, KeyPath]:
    """Follow pydantic's location as far as the content goes; it also names union members."""
    path: list[str | int] = []
    here = content
    for i, part in enumerate(loc):
        if not _has(here, part):
            rest = loc[i:]
            return tuple(path), rest if len(rest) == 1 and _is_field(path, rest[0]) else ()
        here = here[part]
        path.append(part)
    return tuple(path), ()


def _has(here: Any, part: str | int) -> bool:
    if isinstance(here, list):
        return isinstance(part, int) and part < len(here)
    return isinstance(here, dict) and part in here


def _is_field(path: list[str | int], name: str | int) -> bool:
    return isinstance(name, int) or name in fields_at(tuple(path))


def _line(path: KeyPath, details: list[Any], content: Any, where: Where) -> str:
    detail = details[0]
    kind, shown = detail["type"], dotted(path)
    if kind == "extra_forbidden":
        return f"{where(path)}: {unknown_key(path)}"
    if kind == "missing":
        return f"{where(path[:-1])}: {_missing(path)}"
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        return (
            f"{_place_of(text, where)}: {text}" if not path else f"{where(path)}: {shown}: {text}"
        )
    value = _value_at(content, path)
    wishes = " or ".join(dict.fromkeys(_expected(d) for d in details))
    hint = _hint(details, wishes, value)
    return f"{where(path)}: {shown}: expected {wishes}, got {in_words(value)}{hint}"


def _missing(path: KeyPath) -> str:
    shown = dotted(path)
    examples = {
        "model": "add: model: {path: smollm2-135m-instruct}",
        "data": "add: data: {sources: [{path: FILE.jsonl}]}",
        "model.path": "name a folder, a hub name or smollm2-135m-instruct",
        "data.sources": "add: sources: [{path: FILE.jsonl}]",
    }
    if isinstance(path[-1], int):
        return f"{dotted(path[:-1])}: expected more values; number {path[-1] + 1} is missing"
    return f"'{shown}' is missing; {examples.get(shown, 'it has no default')}"


def _expected(detail: Mapping[str, Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        number = f"{context[key]:g}"
        return f"{number} {words}" if words.startswith("or") else f"{words} {number}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        return f"{'at least' if kind == 'too_short' else 'at most'} {wanted} in the list"
    return _EXPECTED.get(kind) or str(detail["msg"])


def _hint(details: list[Any], wishes: str, value: Any) -> str:
    """Suggest what the value was meant to be."""
    if wishes == "text" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if not isinstance(value, str):
        return ""
    expected = (d.get("ctx", {}).get("expected", "") for d in details)
    near = nearest(value, [choice for text in expected for choice in re.findall("'([^']+)'", text)])
    return f"; did you mean '{near}'?" if near else ""


def _place_of(text: str, where: Where) -> str:
    """Find the place of the first field that a message about several names."""
    match = re.search(r"\b([a-z_]+)\.([a-z_]+)\b", text)
    return where((match[1], match[2]) if match else ())


def unknown_key(path: KeyPath) -> str:
    """Say that a key is unknown, and which known one is meant."""
    siblings, shown = fields_at(path[:-1]), dotted(path)
    if path[-1] == "trust_remote_code":
        return f"unknown key '{shown}'; code of a model is never run nor needed: leave the key out"
    at_home = [p for p in all_fields() if p.rpartition(".")[2] == path[-1]]
    near = at_home[0] if at_home else nearest(str(path[-1]), siblings)
    if near:
        return f"unknown key '{shown}'; did you mean '{near}'?"
    section = f"keys of {dotted(path[:-1])}" if path[:-1] else "sections"
    return f"unknown key '{shown}'; {section}: {', '.join(siblings)}"


def fields_at(path: KeyPath) -> list[str]:
    """Return the keys that the schema knows below a path."""
    kind: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        members = [m for m in _members(kind) if _is_section(m) and part in m.model_fields]
        if not members:
            return []
        kind = members[0].model_fields[part].annotation
    return [
        name for member in _members(kind) if _is_section(member) for name in member.model_fields
    ]


def all_fields() -> list[str]:
    """Return every dotted field of a recipe."""
    return [f"{s}.{f}" for s in Recipe.model_fields for f in fields_at((s,))]


def annotation(path: KeyPath) -> Any:
    """Return the type of what stands at a path that the schema knows."""
    kind: Any = Recipe
    for part in path:
        kind = _inside(kind, part)
    return kind


def _inside(kind: Any, part: str | int) -> Any:
    """Return the type of a section's field, of a list's item, or of the value of a key."""
    for member in choices(kind):
        if _is_section(member) and part in member.model_fields:
            return member.model_fields[part].annotation
        if typing.get_origin(member) in (list, dict):
            return typing.get_args(member)[-1]
    return Any


def choices(kind: Any) -> Iterator[Any]:
    """Yield a type, or the members of a union of types."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for member in typing.get_args(kind):
            yield from choices(member)
    elif typing.get_origin(kind) is typing.Annotated:
        yield from choices(typing.get_args(kind)[0])
    else:
        yield kind


def _members(kind: Any) -> Iterator[Any]:
    """Yield a type, or the members of a union or list of types."""
    for member in choices(kind):
        if typing.get_origin(member) is list:
            yield from _members(typing.get_args(member)[0])
        else:
            yield member


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _value_at(content: Any, path: KeyPath) -> Any:
    for part in path:
        content = content[part]
    return content
