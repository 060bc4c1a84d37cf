"""A recipe under construction: fields with the lines that they come from, and what was left out.

A mapping reads a foreign section through `Keys`. What it asks for is carried over or noted; what
nobody asked for is noted at the end, so that no setting is lost without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from raytune_ft.config import problems
from raytune_ft.config.document import KeyPath
from raytune_ft.config.schema import Recipe
from raytune_ft.config.zero import unsharded
from raytune_ft.errors import RecipeError
from raytune_ft.importers.values import Unknown, Value

_SECRET = re.compile(r"token$|key$|secret|password", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Note:
    """One setting that was not carried over as it stands."""

    line: int
    what: str
    advice: str


@dataclass
class Draft:
    """What a mapping has found out so far."""

    source: str
    """The file, as the user calls it."""
    kind: str
    """Whose configuration it is."""
    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    machinery: list[str] = field(default_factory=list)
    """Settings that need no counterpart, by name."""
    sections: list[Keys] = field(default_factory=list)

    def set(self, key: str, data: Any, line: int) -> None:
        """Set a field, `section.name`."""
        section, _, name = key.partition(".")
        self.content.setdefault(section, {})[name] = data
        self.lines[section, name] = line

    def get(self, key: str) -> Any:
        """Return a field that was set, else None."""
        section, _, name = key.partition(".")
        return self.content.get(section, {}).get(name)

    def add_source(self, fields: dict[str, Any], line: int) -> None:
        """Add a data source."""
        sources = self.content.setdefault("data", {}).setdefault("sources", [])
        self.lines["data", "sources", len(sources)] = line
        sources.append({key: value for key, value in fields.items() if value is not None})

    def note(self, line: int, what: str, advice: str) -> None:
        """Write down what was not carried over, and what to do about it."""
        note = Note(line, what, advice)
        if note not in self.notes:
            self.notes.append(note)

    def refuse(self, line: int, what: str, advice: str) -> RecipeError:
        """Return the error of a configuration that cannot become a recipe."""
        return RecipeError(f"{self.where(line)}: {what}; {advice}")

    def where(self, line: int) -> str:
        """Return a place, `my_config.py:41`."""
        return f"{self.source}:{line}"

    def open(self, value: Value, path: str = "") -> Keys:
        """Read a section of keys; `rest` will ask for what stays unread."""
        keys = Keys(self, value, path)
        self.sections.append(keys)
        return keys

    def close(self) -> None:
        """Note every key that nobody asked for."""
        for keys in self.sections:
            for key, value in keys.unread():
                self.note(value.line, f"{keys.shown(key, value)} is left out", keys.unread_means)
        self.sections.clear()
        self._part_from_zero()

    def _part_from_zero(self) -> None:
        """Leave ZeRO out where it cannot spread the optimizer's state, as other trainers let it."""
        optimizer, zero = self.get("train.optimizer"), self.get("train.deepspeed")
        if optimizer is None or zero == "none" or not unsharded(optimizer):
            return
        line = self.lines["train", "optimizer"]
        if zero is not None:
            self.note(line, f"{zero} does not go with {optimizer}", "train.deepspeed is none")
        self.set("train.deepspeed", "none", line)

    def report(self) -> list[str]:
        """Return a line per thing that was not carried over, and one for the machinery."""
        lines = [f"{self.where(n.line)}: {n.what}; {n.advice}" for n in sorted(self.notes)]
        if self.machinery:
            names = ", ".join(dict.fromkeys(self.machinery))
            lines.append(f"{self.source}: needs no counterpart here: {names}")
        return lines

    def recipe(self) -> Recipe:
        """Check the recipe; RecipeError with a line per problem, each with its place."""
        try:
            return Recipe.model_validate(self.content)
        except ValidationError as error:
            found = problems.explain(error, self.content, self._where_is)
            raise RecipeError("\n".join(found)) from None

    def _where_is(self, path: KeyPath) -> str:
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.where(self.lines[path[:end]])
        return self.source


class Keys:
    """The keys of one section, and which of them were read."""

    def __init__(self, draft: Draft, value: Value, path: str) -> None:
        self.draft, self.path, self.line = draft, path, value.line
        self.kind = value.kind
        self.values = value.data if isinstance(value.data, dict) else {}
        self.read: set[str] = {"type"}
        self.unread_means = "it has no counterpart that is known; see docs/recipe.md"

    def __contains__(self, key: str) -> bool:
        """Tell whether the key is there with a value."""
        return key in self.values and self.values[key].data is not None

    def name(self, key: str) -> str:
        """Return a key with the sections around it."""
        return f"{self.path}.{key}" if self.path else key

    def line_of(self, key: str) -> int:
        """Return a key's line; the section's where the key is absent."""
        value = self.values.get(key)
        return self.line if value is None else value.line

    def shown(self, key: str, value: Value) -> str:
        """Write `key = value`; what may be a secret only by its name."""
        name = self.name(key)
        return name if _SECRET.search(key) else f"{name} = {value.short()}"

    def get(self, key: str) -> Value | None:
        """Return a value; None if it is absent, null, or not known without running the file."""
        self.read.add(key)
        value = self.values.get(key)
        if value is None or value.data is None:
            return None
        if isinstance(value.data, Unknown):
            self.draft.note(
                value.line, f"{self.name(key)}: {value.data.reason}", "set it in the recipe"
            )
            return None
        return value

    def plain(self, key: str, default: Any = None) -> Any:
        """Return a value without its place."""
        value = self.get(key)
        return default if value is None else value.plain()

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number, or the default; another value is refused with its place."""
        value = self.plain(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._refused(key, "a number")
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> Any:
        """Return a text, or the default; another value is refused with its place."""
        value = self.plain(key)
        if value is not None and not isinstance(value, str):
            raise self._refused(key, "text")
        return default if value is None else value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, also of a single one or of `a,b`."""
        value = self.plain(key, [])
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise self._refused(key, "text, or a list of texts")
        return [part.strip() for part in parts if part.strip()]

    def mapping(self, key: str) -> dict[str, Any]:
        """Return keys with values, none if they are absent."""
        value = self.plain(key, {})
        if not isinstance(value, dict):
            raise self._refused(key, "keys with values")
        return value

    def _refused(self, key: str, wanted: str) -> RecipeError:
        value = self.values[key]
        what = f"{self.name(key)}: expected {wanted}, got {value.short()}"
        return self.draft.refuse(value.line, what, "correct it")

    def section(self, key: str) -> Keys | None:
        """Open a section inside this one, if it is there."""
        value = self.get(key)
        if value is None or not isinstance(value.data, dict):
            return None
        return self.draft.open(value, self.name(key))

    def carry(self, key: str, field_name: str) -> None:
        """Set a field to a value as it stands, if it is there."""
        value = self.get(key)
        if value is not None:
            self.draft.set(field_name, value.plain(), value.line)

    def carry_all(self, fields: dict[str, str]) -> None:
        """Set fields to values as they stand."""
        for key, field_name in fields.items():
            self.carry(key, field_name)

    def drop(self, keys: Iterable[str]) -> None:
        """Pass over settings of the other program's machinery; they are named together."""
        for key in keys:
            self.read.add(key)
            if key in self:
                self.draft.machinery.append(key)

    def note(self, key: str, what: str, advice: str) -> None:
        """Note a key of this section."""
        self.read.add(key)
        value = self.values.get(key)
        self.draft.note(self.line if value is None else value.line, what, advice)

    def leave(self, keys: dict[str, str]) -> None:
        """Note keys without counterpart, each with what to do; unset and false ones are silent."""
        for key, advice in keys.items():
            value = self.get(key)
            if value is not None and value.data is not False:
                self.note(key, f"{self.shown(key, value)} is not carried over", advice)

    def unread(self) -> list[tuple[str, Value]]:
        """Return keys that have a value and were never asked for."""
        return [(k, v) for k, v in self.values.items() if k not in self.read and k in self]
