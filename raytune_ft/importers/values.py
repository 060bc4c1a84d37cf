"""Values of a foreign configuration, each with the line where it was written.

Both readers give them, the one for Python files and the one for YAML; the mappings read them
through `draft.Keys`, so that a key nobody asked for is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from raytune_ft.config.document import Document, KeyPath

LOADERS = ("from_pretrained", "load", "from_dict")
"""Methods that make an object of the class before them: `AutoTokenizer.from_pretrained`."""


@dataclass(frozen=True)
class Name:
    """A class or function of another module, by its dotted name; it is never imported."""

    dotted: str

    @property
    def last(self) -> str:
        """Return the name without its module, and without a loading method."""
        parts = self.dotted.split(".")
        while len(parts) > 1 and parts[-1] in LOADERS:
            parts.pop()
        return parts[-1]


@dataclass(frozen=True)
class Function:
    """A function that the file itself defines."""

    name: str
    columns: tuple[str, ...]
    """Names that it looks up in its argument, in the order of the text."""


@dataclass(frozen=True)
class Unknown:
    """Something that only running the file would tell."""

    reason: str


Plain: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Value:
    """A value and its place."""

    data: Plain | Name | Function | Unknown | list[Value] | dict[str, Value]
    line: int

    @property
    def kind(self) -> str:
        """Return the class that this is, or that its `type` names; '' if there is none."""
        data = self.data
        if isinstance(data, dict):
            return data["type"].kind if "type" in data else ""
        if isinstance(data, Name):
            return data.last
        return data.rpartition(".")[2] if isinstance(data, str) else ""

    def plain(self) -> Any:
        """Return the value without places; names as their last word, unknown parts as None."""
        data = self.data
        if isinstance(data, dict):
            return {key: value.plain() for key, value in data.items()}
        if isinstance(data, list):
            return [value.plain() for value in data]
        if isinstance(data, Name):
            return data.last
        if isinstance(data, Function):
            return data.name
        return None if isinstance(data, Unknown) else data

    def short(self) -> str:
        """Show the value in a message, short enough for one line."""
        data = self.data
        if isinstance(data, dict):
            return f"{self.kind or 'dict'}(...)"
        if isinstance(data, Unknown):
            return f"({data.reason})"
        text = str(self.plain()) if isinstance(data, Name | Function) else repr(self.plain())
        return text if len(text) <= 48 else f"{text[:45]}..."


def from_document(document: Document) -> Value:
    """Give the values of a YAML document their lines."""

    def build(data: Any, path: KeyPath, line: int) -> Value:
        line = document.lines.get(path, line)
        if isinstance(data, dict):
            return Value({str(k): build(v, (*path, k), line) for k, v in data.items()}, line)
        if isinstance(data, list):
            return Value([build(v, (*path, i), line) for i, v in enumerate(data)], line)
        return Value(data, line)

    return build(document.content, (), 1)
