"""Comparison: several runs in, where their recipes and figures differ out, and a page of curves.

Losses of other tokens are other losses: what makes them so is said, not left to the reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.watching.reporting.charts import overlaid
from raytune_ft.training.watching.reporting.listing import status_of
from raytune_ft.training.watching.reporting.page import main_figures
from raytune_ft.training.watching.reporting.series import Columns
from raytune_ft.training.watching.reporting.style import page, text
from raytune_ft.training.watching.reporting.summary import as_words, lenient, summarize
from raytune_ft.training.watching.reporting.tables import table

SAME_IN_NONE = {"run.name"}
ROWS = ("data.sources", "data.fill", "data.system", "data.compat", "data.on_error", "data.limit")
"""Fields that decide what is learned from; others decide how."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")


@dataclass(frozen=True)
class Comparison:
    """What differs between runs; the columns of every table are `names`."""

    names: list[str]
    recipe: dict[str, list[str]]
    """Differing fields of the recipes -> their values, run by run."""
    figures: dict[str, list[str]]
    """Final figures, run by run, in words."""
    notes: list[str]
    """Why losses or figures cannot be held against each other; empty if they can."""
    columns: dict[str, Columns]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "runs": self.names, "recipe": self.recipe, "figures": self.figures,
            "notes": self.notes,
        }  # fmt: skip


def compare(folders: list[RunFolder]) -> Comparison:
    """Read runs and say where they differ; damaged ones have fewer figures."""
    names = unambiguous([folder.path for folder in folders])
    recipes = [flat(_recipe(folder)) for folder in folders]
    columns = {
        name: Columns(read_jsonl(folder.metrics))
        for name, folder in zip(names, folders, strict=True)
    }
    return Comparison(
        names,
        differing(recipes),
        _figures(folders, list(columns.values())),
        notes(folders, recipes),
        columns,
    )


def unambiguous(paths: list[Path]) -> list[str]:
    """Name runs by their folders, with as many parents as tell them apart."""
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    if len(set(names)) < len(names):  # one run, named twice
        return [f"{name} ({place + 1})" for place, name in enumerate(names)]
    return names


def _recipe(folder: RunFolder) -> dict[str, Any]:
    try:
        content = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields by dotted names; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def differing(recipes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the fields that differ, with their values in words; an empty recipe is unknown."""
    fields = list(dict.fromkeys(field for recipe in recipes for field in recipe))
    found = {}
    for field in fields:
        values = [recipe.get(field) for recipe in recipes]
        known = [value for value, recipe in zip(values, recipes, strict=True) if recipe]
        if field not in SAME_IN_NONE and any(value != known[0] for value in known):
            found[field] = ["" if value is None else as_words(value) for value in values]
    return found


def _figures(folders: list[RunFolder], columns: list[Columns]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place, (folder, one) in enumerate(zip(folders, columns, strict=True)):
        summary = summarize(folder, one)
        status = status_of(folder, lenient(folder, "run.json"))
        best = summary.best or {}
        figures = {"status": status, **main_figures(summary, best_apart=True)}
        if best:
            figures["best, at step"] = f"{best.get('value'):.4f}, {best.get('step')}"
        for name, words in figures.items():
            found.setdefault(name, [""] * len(folders))[place] = words
    return {name: words for name, words in found.items() if any(words)}


def notes(folders: list[RunFolder], recipes: list[dict[str, Any]]) -> list[str]:
    """Say what makes the runs' losses or speeds incomparable."""
    found = [
        f"{folder.path.name}: recipe.yaml is missing or damaged; its fields are not compared"
        for folder, recipe in zip(folders, recipes, strict=True)
        if not recipe
    ]
    folders = [folder for folder, recipe in zip(folders, recipes, strict=True) if recipe]
    recipes = [recipe for recipe in recipes if recipe]
    if len({_tokenizer(folder) for folder in folders}) > 1:
        found.append("their tokenizers differ: a loss per token is not comparable")
    elif len({str(recipe.get("model.template")) for recipe in recipes}) > 1:
        found.append("their prompt templates differ: other tokens are learned, other losses")
    if any(len({as_words(recipe.get(field)) for recipe in recipes}) > 1 for field in ROWS):
        found.append("they learn from other rows: training losses are not comparable")
    if len({as_words(recipe.get("data.validation")) for recipe in recipes}) > 1:
        found.append("their held-out rows differ: held-out losses are not comparable")
    if len({as_words(recipe.get("train.objective", "sft")) for recipe in recipes}) > 1:
        found.append("their objectives differ: so do their losses")
    if len({_devices(folder) for folder in folders}) > 1:
        found.append("they ran on other devices: speed and memory are not comparable")
    return found


def _tokenizer(folder: RunFolder) -> str:
    """Identify a run's tokenizer by its file; by the model folder's name where that is gone."""
    place = Path(str(lenient(folder, "run.json").get("model_folder", "")))
    for name in TOKENIZERS:
        try:
            return hashlib.sha256((place / name).read_bytes()).hexdigest()
        except OSError:
            continue
    return place.name


def _devices(folder: RunFolder) -> str:
    known = lenient(folder, "environment.json")
    return as_words(known.get("gpus") or known.get("platform"))


def compare_page(found: Comparison) -> str:
    """Return a page with all curves over each other, and the tables."""
    keys = "".join(
        f"<span class='run'><i class='b{place % 8}'></i>{text(name)}</span>"
        for place, name in enumerate(found.names)
    )
    parts = [f"<h1>{len(found.names)} runs compared</h1><p class=keys>{keys}</p>"]
    parts += [f"<p class=note>{text(note)}</p>" for note in found.notes]
    parts.append(overlaid(found.columns))
    for title, rows in (("Figures", found.figures), ("Recipe fields that differ", found.recipe)):
        if rows:
            cells = [[field, *words] for field, words in rows.items()]
            parts.append(f"<h2>{title}</h2>{table(['', *found.names], cells)}")
    return page("runs compared", parts)
