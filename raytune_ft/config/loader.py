"""Recipes: a file, a file under `configs/` or a shipped name, plus `key=value` arguments, checked.

Order of strength: argument over file over `base`. Mappings are merged key by key, lists replaced.
All problems of a recipe are reported in one RecipeError, a line each.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_ft.config import catalog, problems
from raytune_ft.config.document import (
    Document,
    KeyPath,
    dotted,
    in_words,
    nearest,
    read_file,
    read_text,
)
from raytune_ft.config.schema import Recipe
from raytune_ft.config.written import dump_yaml
from raytune_ft.errors import RecipeError

__all__ = ["dump_yaml", "load_recipe", "recipe_stem"]

ARGUMENT = "argument"
SUFFIXES = (".yaml", ".yml")
SHORTHANDS: dict[str, KeyPath] = {"compat": ("data", "compat")}
"""Words at the top of a recipe, or of an argument, that stand for a field of a section."""


def load_recipe(config: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        config: a file, a file under `configs/`, or a shipped name.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        RecipeError: one line per problem, each with its file and line or `argument`.
    """
    merged = _Merged()
    document = _open(config)
    base = _base_of(document, config)
    for each in [document] if base is None else [base, document]:
        _spell_out(each)
        merged.add(each)
    for text in overrides:
        merged.override(text)
    return merged.check()


def recipe_stem(config: str) -> str:
    """Return a word for run names: the file's stem, or the shipped name."""
    path = Path(config)
    stem = path.stem if path.suffix in SUFFIXES else path.name
    if stem == "recipe" and path.is_file():  # runs/NAME/recipe.yaml
        stem = path.resolve().parent.name
    word = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:48].strip("._-")
    return word or "run"


@dataclass
class _Merged:
    """Documents laid over each other, and what was wrong on the way."""

    content: dict[str, Any] = field(default_factory=dict)
    owners: dict[KeyPath, Document] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    broken: set[KeyPath] = field(default_factory=set)

    def add(self, document: Document) -> None:
        """Lay a document over what is there."""
        self.problems += document.problems
        self.broken |= document.broken
        self._merge(self.content, document.content, (), document)

    def _merge(self, below: Any, above: Any, path: KeyPath, document: Document) -> None:
        for key, value in above.items():
            here = (*path, key)
            self.owners[here] = document
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                self._merge(below[key], value, here, document)
            else:
                below[key] = value

    def override(self, text: str) -> None:
        """Lay one `key=value` argument over what is there."""
        try:
            path, value = _parse_override(text, self.content)
        except RecipeError as error:
            self.problems.append(str(error))
            return
        document = Document(ARGUMENT)
        here: Any = self.content
        for part in path[:-1]:
            if isinstance(here, dict) and not isinstance(here.get(part), dict | list):
                here[part] = {}
            here = here[part]
        here[path[-1]] = value
        self.owners[path] = document

    def where(self, path: KeyPath) -> str:
        """Write the place of a key: that of the document that set it last."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.owners:
                return self.owners[path[:end]].where(path)
        documents = [d for d in self.owners.values() if d.source != ARGUMENT]
        return documents[-1].source if documents else ARGUMENT

    def check(self) -> Recipe:
        """Build the Recipe; RecipeError with everything that is wrong."""
        self.problems += [
            f"{self.where(path)}: {dotted(path)}: expected a finite number, got {value}"
            for path, value in _not_finite(self.content, ())
        ]
        try:
            # JSON mode is strict about types, yet takes lists for tuples
            recipe = Recipe.model_validate_json(json.dumps(self.content), strict=True)
        except ValidationError as error:
            self.problems += problems.explain(error, self.content, self.where, self.broken)
        if not self.problems:
            return recipe
        raise RecipeError("\n".join(sorted(self.problems, key=_line_number)))


def _line_number(problem: str) -> int:
    """Return the line that a problem names, so that they are read in the file's order."""
    match = re.match(r"[^\n]*?:(\d+): ", problem)
    return int(match[1]) if match else 0


def _not_finite(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, float]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _not_finite(inner, (*path, key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, value


def _open(config: str) -> Document:
    """Find what `config` names and read it."""
    path = find_file(config)
    if path is not None:
        return read_file(path, config)
    if catalog.is_path(config):
        raise RecipeError(f"{config}: no such file{_near_file(config)}")
    return Document(config, catalog.resolve(config))


def find_file(config: str) -> Path | None:
    """Return the file that `config` names, here or under `configs/`; None if it names none."""
    given = Path(config).expanduser()
    shipped = catalog.configs_dir()
    candidates = [given, shipped / config, *(shipped / f"{config}{s}" for s in SUFFIXES)]
    for path in candidates if config.strip() else []:
        try:
            if path.is_dir() and path == given:
                recipe = path / "recipe.yaml"
                hint = f"name {recipe}" if recipe.is_file() else "name a YAML file in it"
                raise RecipeError(f"{config}: is a folder; {hint}")
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name too long for the file system, or with NUL
            continue
    return None


def _near_file(config: str) -> str:
    given = Path(config)
    folder = given.parent if given.parent.is_dir() else Path()
    here = [p.name for p in folder.iterdir() if p.suffix in SUFFIXES]
    shipped = [p.name for p in catalog.configs_dir().glob("*.yaml")]
    near = nearest(given.name, [*here, *shipped, *catalog.names()])
    near = near or nearest(given.stem, catalog.names())
    if near is None:
        return "; shipped recipes: raytune-ft list"
    return f"; nearest: {folder / near if near in here else near}"


def _base_of(document: Document, config: str) -> Document | None:
    """Take `base` out of a document and read what it names."""
    if "base" not in document.content:
        return None
    name = document.content.pop("base")
    where = document.where(("base",))
    if not isinstance(name, str) or not name:
        document.problems.append(
            f"{where}: base: expected a shipped name or a file, got {in_words(name)}"
        )
        return None
    path = find_file(config)
    beside = path.parent / name if path is not None else Path(name)
    try:
        base = read_file(beside, str(beside)) if beside.is_file() else _open(name)
    except RecipeError as error:
        message = str(error).removeprefix(f"{name}: ")
        raise RecipeError(f"{where}: base '{name}': {message}") from None
    if "base" in base.content:
        raise RecipeError(
            f"{where}: base '{name}' has a base itself ({base.where(('base',))}); "
            "one level is allowed: copy its keys into one of the two"
        )
    return base


def _spell_out(document: Document) -> None:
    """Put the value of a shorthand where it belongs; both spellings at once are a problem."""
    for word in SHORTHANDS.keys() & document.content.keys():
        section, name = SHORTHANDS[word]
        value = document.content.pop(word)
        place = document.where((word,))
        inside = document.content.setdefault(section, {})
        if not isinstance(inside, dict):  # the schema says so
            continue
        if name in inside:
            other = document.where((section, name))
            document.problems.append(
                f"{place}: '{word}' is '{section}.{name}', which stands in {other} already; "
                "keep one"
            )
        inside[name] = value
        if (word,) in document.lines:
            document.lines[section, name] = document.lines[word,]


def _parse_override(text: str, content: dict[str, Any]) -> tuple[KeyPath, Any]:
    """Split `a.b=value`; RecipeError names the nearest field if there is none like it."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"{ARGUMENT}: '{text}': expected key=value, such as train.lr=2e-4")
    key = dotted(SHORTHANDS[key]) if key in SHORTHANDS else key
    section, _, rest = key.partition(".")
    name, _, inner = rest.partition(".")
    if name not in problems.fields_at((section,)):
        near = nearest(key, problems.all_fields())
        near = near or next((f for f in problems.all_fields() if f.endswith(f".{key}")), None)
        hint = f"did you mean '{near}'?" if near else "fields: raytune-ft show NAME"
        raise RecipeError(f"{ARGUMENT}: unknown key '{key}'; {hint}")
    path: KeyPath = (section, name)
    if inner:
        path = _inner_path(key, path, inner, content)
    return path, _override_value(raw.strip(), key, path)


def _inner_path(key: str, path: KeyPath, inner: str, content: dict[str, Any]) -> KeyPath:
    """Resolve what follows `section.field.`: a key of a mapping, or a place in data.sources."""
    if typing.get_origin(problems.annotation(path)) is dict:
        return (*path, inner)
    if path != ("data", "sources"):
        raise RecipeError(f"{ARGUMENT}: unknown key '{key}'; did you mean '{dotted(path)}'?")
    place, _, rest = inner.partition(".")
    name, _, column = rest.partition(".")
    data = content.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    count = len(sources) if isinstance(sources, list) else 0
    if not (place.isdecimal() and int(place) < count):
        raise RecipeError(f"{ARGUMENT}: '{key}': data.sources has the places 0 to {count - 1}")
    here: KeyPath = (*path, int(place), name)
    if name not in problems.fields_at(path):
        raise RecipeError(f"{ARGUMENT}: {problems.unknown_key(here)}")
    if not column:
        return here
    if typing.get_origin(problems.annotation(here)) is not dict:
        raise RecipeError(f"{ARGUMENT}: unknown key '{key}'; did you mean '{dotted(here)}'?")
    return (*here, column)


def _override_value(raw: str, key: str, path: KeyPath) -> Any:
    """Read a value as YAML, or as it stands where the field is text."""
    is_text = _is_text(path)
    if is_text and not raw.startswith(("'", '"')):
        return None if raw in ("null", "~") else raw
    try:
        document = read_text(raw, ARGUMENT, lines=False)
    except RecipeError as error:
        message = str(error).removeprefix(f"{ARGUMENT}: ")
        raise RecipeError(f"{ARGUMENT}: {key}: {message}") from None
    if document.problems:
        raise RecipeError(document.problems[0].replace(ARGUMENT, f"{ARGUMENT}: {key}", 1))
    return document.content


def _is_text(path: KeyPath) -> bool:
    """Tell whether a field holds text and nothing but text (or null)."""
    return set(problems.choices(problems.annotation(path))) <= {str, type(None)}
