"""A sweep that cannot give what it promises is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.checks import check
from raytune_ft.sweeping.space import STEPS


def recipe(space: dict[str, Any], **data: Any) -> Recipe:
    section = {"sources": [{"path": "rows.jsonl"}], **data}
    return Recipe.model_validate(
        {"model": {"path": "m"}, "data": section, "tune": {"space": space}}
    )


@pytest.mark.parametrize("field", STEPS)
def test_steps_that_are_counted_once_cannot_be_swept(field: str) -> None:
    check(recipe({field: [1, 2]}))
    with pytest.raises(RecipeError, match=rf"^tune\.space: '{field}' cannot be swept under data"):
        check(recipe({field: [1, 2]}, compat="xtuner-0.1.9"))


def test_other_fields_are_swept_under_compat_too() -> None:
    check(recipe({"train.lr": [1e-4, 2e-4]}, compat="xtuner-0.1.9"))


@pytest.mark.parametrize("space", [{}, {"data.window": [1, 2]}, {"lora.rank": [1]}])
def test_spaces_that_mean_nothing(space: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"^[^\n]+$"):
        check(recipe(space))
