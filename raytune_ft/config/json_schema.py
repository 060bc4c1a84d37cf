"""The recipe as JSON Schema (draft 2020-12), so that editors complete and check recipe files.

The fields are the schema's own. A file may also say `base`, which brings required fields along,
and the shorthands of `config.loader`.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.config.loader import SHORTHANDS
from raytune_ft.config.schema import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
BASE = {
    "type": "string",
    "minLength": 1,
    "description": "Shipped name or file that this one starts from; what stands here goes first.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file."""
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    # without a base these must be there; with one they may come from it
    needed = {
        name: {"required": sections[ref]["required"]}
        for name, ref in {"model": "ModelSection", "data": "DataSection"}.items()
    }
    for ref in ("ModelSection", "DataSection"):
        sections[ref].pop("required")
    shorthands = {
        word: {
            **sections[_section_of(section)]["properties"][name],
            "description": f"Stands for {section}.{name}.",
        }
        for word, (section, name) in SHORTHANDS.items()
    }
    return {
        "$schema": DRAFT,
        **schema,
        "title": "raytune_ft recipe",
        "properties": {"base": BASE, **shorthands, **schema["properties"]},
        "required": [],
        "if": {"not": {"required": ["base"]}},
        "then": {"required": list(needed), "properties": needed},
    }


def _section_of(section: str | int) -> str:
    annotation: Any = Recipe.model_fields[str(section)].annotation
    return str(annotation.__name__)
