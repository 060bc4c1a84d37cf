"""Recipes of sweeps for tests, and trials whose whole training is a curve."""

from __future__ import annotations

from typing import Any

from raytune_ft.config.schema import Recipe


def recipe_of(space: dict[str, Any], *, tune: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """Make a sweep's recipe; `data` and other sections as in a file."""
    data = {"sources": [{"path": "rows.jsonl"}], **more.pop("data", {})}
    model = {"path": "m", **more.pop("model", {})}
    section = {"space": space, **(tune or {})}
    return Recipe.model_validate({"model": model, "data": data, "tune": section, **more})
