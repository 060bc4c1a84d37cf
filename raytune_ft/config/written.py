"""A recipe as YAML: standalone, in pipeline order, each field with its meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import yaml

from raytune_ft.config.document import EXPONENT
from raytune_ft.config.schema import Recipe, Section, Source

_LINE_ENDS = "\n\r\x85\u2028\u2029"
WIDTH = 100
"""Columns; a comment that would pass them stands above its field."""

_Choose = Callable[[Section], list[str]]
"""Gives the fields of a section that are written."""


def dump_yaml(recipe: Recipe, title: str | None = None) -> str:
    """Write a recipe that needs nothing else: reading it gives the same recipe again."""
    parts = [f"# {row}".rstrip() + "\n" for row in (title or "").splitlines()]
    sections = [
        _section(getattr(recipe, name), name, _sayable) for name in type(recipe).model_fields
    ]
    return "".join(parts) + ("\n" if parts else "") + "\n".join(sections)


def dump_changes(recipe: Recipe) -> str:
    """Write the fields that differ from their defaults, with their meaning."""
    sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return "\n".join(
        _section(section, name, changed_fields)
        for name, section in sections.items()
        if changed_fields(section)
    )


def changed_fields(section: Section) -> list[str]:
    """Return the names of the fields that differ from their defaults."""
    return [
        name
        for name, info in type(section).model_fields.items()
        if info.is_required() or getattr(section, name) != info.get_default()
    ]


def _sayable(section: Section) -> list[str]:
    """Return all fields; of a data source, which has many, those that say something."""
    fields = type(section).model_fields
    if isinstance(section, Source):
        return [name for name in fields if getattr(section, name) is not None]
    return list(fields)


def _section(section: Section, name: str, choose: _Choose) -> str:
    meaning = " ".join((type(section).__doc__ or "").split())
    return f"{name}:{f'  # {meaning}' if meaning else ''}\n" + _fields(section, choose, True, WIDTH)


def _fields(section: Section, choose: _Choose, explained: bool, width: int) -> str:
    content = section.model_dump(mode="json")
    texts = []
    for name in choose(section):
        description = type(section).model_fields[name].description if explained else None
        value = getattr(section, name)
        if isinstance(value, list) and value and isinstance(value[0], Section):
            texts.append(_comment(description, width) + f"  {name}:\n" + _items(value, choose))
        else:
            texts.append(_entry(name, content[name], description, width))
    return "".join(texts)


def _items(sections: Sequence[Section], choose: _Choose) -> str:
    """Write the sections of a list; what their fields mean stands at the first."""
    texts = []
    for place, section in enumerate(sections):
        rows = _fields(section, choose, not place, WIDTH - 4).splitlines()
        start = next(n for n, row in enumerate(rows) if not row.startswith("  # "))
        texts += [f"  {row}\n" for row in rows[:start]]
        texts.append(f"    - {rows[start].removeprefix('  ')}\n")
        texts += [f"    {row}\n" for row in rows[start + 1 :]]
    return "".join(texts)


def _entry(name: str, value: Any, description: str | None, width: int) -> str:
    text = _yaml(name, value)
    meaning = " ".join((description or "").split())
    if not meaning:
        return text
    if text.count("\n") == 1 and len(text) + len(meaning) + 3 <= width:
        return text.removesuffix("\n") + f"  # {meaning}\n"
    return _comment(meaning, width) + text


def _comment(meaning: str | None, width: int) -> str:
    rows = _wrapped(" ".join((meaning or "").split()), width)
    return "".join(f"  # {row}\n" for row in rows if row)


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


def _wrapped(text: str, width: int) -> list[str]:
    rows, row = [], ""
    for word in text.split():
        if len(row) + len(word) + 5 > width and row:
            rows.append(row)
            row = ""
        row = f"{row} {word}".strip()
    return [*rows, row]
