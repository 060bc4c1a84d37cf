"""YAML text in, plain values with the line of every key out. Safe tags only, no duplicates.

PyYAML's loader forgets lines, lets the last of two equal keys win and reads `2e-4` as text. So the
node tree is turned into values here. Problems are collected: a file is reported once, in full.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raytune_ft.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and list places from the top: ("data", "sources", 0, "path")."""

MAX_BYTES = 1 << 20
"""Longer files are no recipes, but weights or data named by mistake."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
EXPONENT = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+")
"""Numbers such as `2e-4`, which PyYAML takes for text."""
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float")}
_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}


@dataclass
class Document:
    """Values of one file or argument, and where each came from."""

    source: str
    """As people call it: a path, a shipped name, or `argument`."""
    content: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    broken: set[KeyPath] = field(default_factory=set)
    """Keys whose value could not be read; their problem is told already."""

    def where(self, path: KeyPath) -> str:
        """Write `my.yaml:7`, the line of the nearest key above if this one has none."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return self.source


def read_file(path: Path, source: str) -> Document:
    """Read a YAML file; RecipeError if it is no YAML text. Key problems are left in the result."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{source}: is too large for a recipe; name a YAML file")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: is not a text file; name a YAML file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise RecipeError(f"{source}: is not a text file; name a YAML file in UTF-8")
    document = read_text(text, source)
    if document.content is None:
        raise RecipeError(f"{source}: is empty; start from: raytune-ft copy NAME DIR")
    if not isinstance(document.content, dict):
        raise RecipeError(
            f"{source}:1: expected sections such as 'model:', got {in_words(document.content)}"
        )
    return document


def read_text(text: str, source: str, *, lines: bool = True) -> Document:
    """Read YAML text; RecipeError with the line if its syntax is wrong."""
    document = Document(source)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            document.content = _Reader(document, lines).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and lines else ""
        raise RecipeError(f"{source}{line}: {_syntax(error, text, mark)}") from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"{source}: is not YAML: {first}") from None
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply for a recipe") from None
    return document


def _syntax(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    """Say what is wrong with the syntax, in the words of someone who writes recipes."""
    rows = text.splitlines()
    row = rows[mark.line] if mark is not None and mark.line < len(rows) else ""
    if "\t" in row[: len(row) - len(row.lstrip())] or "'\\t'" in str(error.problem):
        return "a tab indents this line; use spaces"
    if error.context and "expected a single document" in error.context:
        return "a second document starts here; a recipe is one document, without '---' lines"
    parts = [p for p in (error.problem, error.context) if p]
    return f"is not YAML: {' '.join(parts)}; check colons, quotes and indentation near here"


class _Reader:
    """Turns nodes into values."""

    def __init__(self, document: Document, lines: bool) -> None:
        self.document, self.keep_lines = document, lines
        self.seen: set[int] = set()
        self.scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Build the value of a node and record the lines of the keys in it."""
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode):
            if id(node) in self.seen:
                self._problem(node, "an alias ('*') repeats a part; write it out instead", path)
                return None
            self.seen.add(id(node))
            if node.tag not in _COLLECTIONS:
                self._tag_problem(node, path)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101  YAML has three kinds of nodes
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(key, str):
                self._problem(key_node, "a key must be a word")
            elif key_node.tag == "tag:yaml.org,2002:merge":
                self._problem(key_node, "merge keys ('<<') are not used; start with 'base:'")
            elif key in content:
                first = self.document.lines[(*path, key)]
                shown = dotted((*path, key))
                self._problem(key_node, f"'{shown}' stands in line {first} already; keep one")
            else:
                content[key] = None
                self.document.lines[(*path, key)] = key_node.start_mark.line + 1
                content[key] = self.value(value_node, (*path, key))
        return content

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        if node.tag not in _SCALARS:
            if node.tag.startswith("tag:yaml.org,2002:") and not node.style:
                return node.value  # dates and the like are words here
            self._tag_problem(node, path)
            return None
        if node.tag.endswith(":str") and not node.style and EXPONENT.fullmatch(node.value):
            return float(node.value.replace("_", ""))
        try:
            return self.scalars.construct_object(node)
        except (ValueError, OverflowError):
            return node.value

    def _tag_problem(self, node: yaml.Node, path: KeyPath) -> None:
        self._problem(node, f"the tag '{node.tag}' is not allowed; write a plain value", path)

    def _problem(self, node: yaml.Node, text: str, broken: KeyPath | None = None) -> None:
        if broken is not None:
            self.document.broken.add(broken)
        line = f":{node.start_mark.line + 1}" if self.keep_lines else ""
        self.document.problems.append(f"{self.document.source}{line}: {text}")


def dotted(path: KeyPath) -> str:
    """Write a path as people type it: `data.sources.0.path`."""
    return ".".join(map(str, path))


def in_words(value: Any) -> str:
    """Show a value in a message, short enough for one line."""
    if isinstance(value, dict):
        return f"keys ({', '.join(map(str, value))[:40]})" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, choices: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that is most like `word`, if one is."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None
