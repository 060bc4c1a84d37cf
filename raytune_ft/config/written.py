"""A recipe as YAML: standalone, in pipeline order, each field with its meaning."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from raytune_ft.config.document import EXPONENT
from raytune_ft.config.schema import Recipe, Section

_LINE_ENDS = "\n\r\x85\u2028\u2029"
WIDTH = 100
"""Columns; a comment that would pass them stands above its field."""


def dump_yaml(recipe: Recipe, title: str | None = None) -> str:
    """Write a recipe that needs nothing else: reading it gives the same recipe again."""
    parts = [f"# {title}\n"] if title else []
    for name in Recipe.model_fields:
        section: Section = getattr(recipe, name)
        meaning = " ".join((type(section).__doc__ or "").split())
        parts.append(f"{name}:{f'  # {meaning}' if meaning else ''}\n" + _fields(section))
    return "\n".join(parts)


def _fields(section: BaseModel) -> str:
    content = section.model_dump(mode="json")
    return "".join(
        _entry(name, content[name], info.description)
        for name, info in type(section).model_fields.items()
    )


def _entry(name: str, value: Any, description: str | None) -> str:
    text = _yaml(name, _plain(value))
    meaning = " ".join((description or "").split())
    if not meaning:
        return text
    if text.count("\n") == 1 and len(text) + len(meaning) + 3 <= WIDTH:
        return text.removesuffix("\n") + f"  # {meaning}\n"
    return "".join([*(f"  # {row}\n" for row in _wrapped(meaning)), text])


def _plain(value: Any) -> Any:
    """Leave fields of data sources out where they say nothing."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return [{k: v for k, v in item.items() if v is not None} for item in value]
    return value


def _yaml(name: str, value: Any) -> str:
    """Write one field, indented as a part of its section."""
    is_collection = isinstance(value, dict | list)
    text = yaml.dump(
        {"section": {name: value}},
        Dumper=_Dumper,
        allow_unicode=True,
        sort_keys=False,
        width=10**6,
        default_flow_style=None if is_collection and _is_short(value) else False,
    )
    return text.partition("\n")[2]


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key and writes texts of several lines as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if EXPONENT.fullmatch(text):
        style = "'"
    elif any(char in _LINE_ENDS for char in text):
        style = "|" if _is_block(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _is_block(text: str) -> bool:
    """Tell whether a text of several lines survives PyYAML's block style unchanged."""
    lines = text.removesuffix("\n").split("\n")
    return all(line == line.strip() and line.isprintable() for line in lines) and all(
        (lines[0], lines[-1])
    )


_Dumper.add_representer(str, _represent_text)


def _is_short(value: Any) -> bool:
    """Tell whether a collection reads well on one line."""
    values = list(value.values()) if isinstance(value, dict) else value
    return all(
        not isinstance(v, dict | list | str) or (isinstance(v, str) and len(v) < 24) for v in values
    )


def _wrapped(text: str) -> list[str]:
    rows, row = [], ""
    for word in text.split():
        if len(row) + len(word) + 5 > WIDTH and row:
            rows.append(row)
            row = ""
        row = f"{row} {word}".strip()
    return [*rows, row]
