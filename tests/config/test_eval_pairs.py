"""Settings of the section `eval` that would measure nothing, or keep the worst."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.schema import Recipe


def recipe_of(
    wanted: dict[str, Any], validation: float | None = 0.1, objective: str = "sft"
) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "m"},
        "data": {"sources": [{"path": "rows.jsonl"}], "validation": validation},
        "train": {"objective": objective},
        "eval": wanted,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "setting", "told"),
    [
        ({"patience": 2}, {"validation": None}, "eval.patience needs held-out rows"),
        ({"export": "best"}, {"validation": None}, "eval.export: best needs held-out rows"),
        ({"metrics": ["chrf"]}, {"validation": None}, "eval.metrics needs held-out rows"),
        ({"metric": "val_chrf", "mode": "max"}, {}, "'val_chrf' is not measured; choose"),
        ({"metric": "val_chrf", "metrics": ["chrf"]}, {}, "keep the worst val_chrf; set eval.mod"),
        ({"mode": "max"}, {}, "keep the worst val_loss; set eval.mode: min"),
        ({"metrics": ["rouge"]}, {"objective": "dpo"}, "preference rows have two"),
        ({"metric": "val_perplexity"}, {"objective": "orpo"}, "'val_perplexity' is not measured"),
        (
            {"metric": "val_rewards_accuracy"}, {"objective": "dpo"},
            "keep the worst val_rewards_accuracy; set eval.mode: max",
        ),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_with_what_to_use_instead(
    wanted: dict[str, Any], setting: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match="eval") as caught:
        recipe_of(wanted, **setting)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "objective"),
    [
        ({"patience": 2, "export": "best", "metric": "val_perplexity"}, "sft"),
        ({"metrics": ["chrf", "rouge"], "metric": "val_rouge", "mode": "max"}, "sft"),
        ({"metric": "val_rewards_margin", "mode": "max"}, "orpo"),
    ],
)
def test_what_works_is_taken(wanted: dict[str, Any], objective: str) -> None:
    assert recipe_of(wanted, objective=objective).eval.metric == wanted["metric"]
