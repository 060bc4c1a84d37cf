"""What can be swept, what its values are, and one line for what cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config import problems
from raytune_ft.config.schema import TuneSection
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.checks import check
from raytune_ft.sweeping.space import FIXED, FIXED_SECTIONS, Range, Space, with_values
from tests.sweeping.made import recipe_of

NUMBERS = st.floats(0.0, 1.0, exclude_max=True)


@given(u=NUMBERS)
def test_a_range_holds_its_numbers(u: float) -> None:
    assert 1e-5 <= Range(1e-5, 1e-1, True, None, False).at(u) <= 1e-1
    assert 2.0 <= Range(2.0, 3.0, False, None, False).at(u) <= 3.0
    for log in (False, True):
        value = Range(3, 9, log, None, True).at(u)
        assert isinstance(value, int)
        assert 3 <= value <= 9
    assert Range(0.0, 0.3, False, 0.1, False).at(u) in [0.0, 0.1, 0.2, 3 * 0.1]
    assert Range(4, 17, False, 4, True).at(u) in (4, 8, 12, 16)


def test_a_log_range_is_even_in_the_logarithm() -> None:
    middle = Range(1e-4, 1e-2, True, None, False).at(0.5)
    assert math.isclose(middle, 1e-3)


def test_ties_follow_each_other_and_fixed_fields() -> None:
    space = {"lora.alpha": "2 * lora.r", "lora.r": [4, 8], "train.min_lr": "0.1 * train.lr"}
    recipe = recipe_of(space, train={"lr": 1e-3})
    assert Space.of(recipe).values({"lora.r": 8}, recipe) == {
        "lora.alpha": 16, "lora.r": 8, "train.min_lr": pytest.approx(1e-4),
    }  # fmt: skip
    chain = {"lora.r": [4], "lora.alpha": "lora.r", "train.accumulation": "0.5 * lora.alpha"}
    values = Space.of(recipe_of(chain)).values({"lora.r": 4}, recipe_of(chain))
    assert values == {"lora.r": 4, "lora.alpha": 4, "train.accumulation": 2}


def test_a_grid_is_every_combination_in_order() -> None:
    space = {
        "lora.r": [4, 8], "lora.alpha": "2 * lora.r",
        "lora.dropout": {"low": 0.0, "high": 0.1, "step": 0.1},
    }  # fmt: skip
    recipe = recipe_of(space)
    assert [tuple(v.values()) for v in Space.of(recipe).grid(recipe)] == [
        (4, 8, 0.0), (4, 8, 0.1), (8, 16, 0.0), (8, 16, 0.1),
    ]  # fmt: skip


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "tune.space: is empty; name fields, such as: tune: {space: {lora.r: [8, 16]}}"),
    ({"lora.rr": [1]}, "there is no field 'lora.rr' in a recipe; did you mean 'lora.r'?"),
    ({"data.sources.3.weight": [1]}, "there is no field 'data.sources.3.weight'"),
    ({"run.name": ["a"]}, "'run.name' cannot be swept: it says where a run happens"),
    ({"tune.trials": [1]}, "'tune.trials' cannot be swept: it is the sweep's own"),
    ({"lora.r": []}, "'lora.r' has no choices; name some: [...]"),
    ({"lora.r": [4, 0]}, "lora.r: expected 1 or more, got 0"),
    ({"lora.dropout": ["x"]}, "lora.dropout: expected a number, got 'x'"),
    ({"lora.r": {"low": 1.5, "high": 3}}, "'lora.r': takes whole numbers, not 1.5"),
    ({"train.lr": {"low": 1}}, "a range is {low, high}, with log: 1 or step if you like"),
    ({"train.lr": {"low": 2, "high": 1}}, "low 2 is above high 1; turn them round"),
    ({"train.lr": {"low": 0, "high": 1, "log": 1}}, "a log scale has no 0; begin above 0"),
    ({"train.lr": {"low": 1, "high": 2, "log": 1, "step": 1}}, "has a step and a log scale"),
    ({"train.lr": {"low": 1, "high": 2, "step": 0}}, "step 0 leads nowhere; use more than 0"),
    ({"train.lr": {"low": 0.1, "high": 1, "lgo": 1}}, "a range is {low, high}"),
    ({"lora.alpha": "lora.r", "lora.r": "lora.alpha"}, "'lora.alpha' follows itself (lora.alpha"),
    ({"lora.alpha": "2 * lora.x"}, "follows 'lora.x', which is no field; did you mean 'lora.r'?"),
    ({"lora.alpha": "__import__('os').getpid()"}, "is no tie; write a field, or a number times"),
    ({"lora.alpha": "1e999 * lora.r"}, "is no tie"),
    ({"lora.alpha": "2 * model.path"}, "needs numbers, and model.path has others"),
]


@pytest.mark.parametrize(("space", "words"), WRONG, ids=[str(space) for space, _ in WRONG])
def test_what_cannot_be_is_one_line(space: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Space.of(recipe_of(space))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("tune.space: ")
    assert words in line


def test_a_grid_needs_an_end_of_its_numbers() -> None:
    recipe = recipe_of({"train.lr": {"low": 1e-4, "high": 1e-3}}, tune={"search": "grid"})
    with pytest.raises(RecipeError, match=r"'train\.lr' has no step"):
        check(recipe)


def test_what_is_measured_by_held_out_rows_of_its_own_is_refused() -> None:
    space = {"train.seed": [1, 2]}
    check(recipe_of(space))
    check(recipe_of(space, data={"validation": "held.jsonl"}))
    with pytest.raises(
        RecipeError, match=r"'train\.seed' decides which rows data\.validation 0\.1"
    ):
        check(recipe_of(space, data={"validation": 0.1}))


def test_lora_fields_say_nothing_of_a_full_run() -> None:
    with pytest.raises(RecipeError, match=r"'lora\.r' changes nothing under model\.method 'full'"):
        check(recipe_of({"lora.r": [1, 2]}, model={"method": "full"}))
    check(recipe_of({"lora.r": [1, 2], "model.method": ["lora", "full"]}, model={"method": "full"}))


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"metric": "val_loss"}, "tune.metric: 'val_loss' needs held-out rows"),
        ({"metric": "val_chrf", "mode": "max"}, "tune.metric: 'val_chrf' is not measured; choose"),
        ({"mode": "max"}, "tune.mode: 'max' would look for the worst loss; set tune.mode: min"),
    ],
)
def test_a_metric_has_to_be_measured(tune: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(recipe_of({"lora.r": [1, 2]}, tune=tune))
    assert str(caught.value).startswith(words)


def test_a_generation_metric_is_one() -> None:
    recipe = recipe_of(
        {"lora.r": [1, 2]}, tune={"metric": "val_chrf", "mode": "max"},
        data={"validation": 0.1}, eval={"metrics": ["chrf"]},
    )  # fmt: skip
    check(recipe)


def test_only_trials_with_other_packs_prepare_for_themselves() -> None:
    assert not Space.of(recipe_of({"lora.r": [1], "train.epochs": [1, 2]})).own_rows
    assert Space.of(recipe_of({"data.max_length": [64, 128]})).own_rows
    assert Space.of(recipe_of({"train.seed": [1, 2]})).own_rows


def test_a_trial_s_recipe_is_a_run_s() -> None:
    recipe = recipe_of({"lora.r": [4], "data.sources.0.weight": [2.0]})
    own = with_values(recipe, {"lora.r": 4, "data.sources.0.weight": 2.0})
    assert own.tune == TuneSection()
    assert (own.lora.r, own.data.sources[0].weight) == (4, 2.0)


def test_what_is_wrong_only_together_is_a_trial_s_own_mistake() -> None:
    recipe = recipe_of({"train.min_lr": [1e-5, 1.0]})
    check(recipe)
    with pytest.raises(RecipeError, match=r"train\.min_lr is above train\.lr"):
        with_values(recipe, {"train.min_lr": 1.0})


@pytest.mark.parametrize("field", problems.all_fields())
def test_every_field_is_swept_or_refused_with_a_reason(field: str) -> None:
    """A new field counts as one that can be swept; `space.FIXED` has those that cannot."""
    refused = field.partition(".")[0] in FIXED_SECTIONS or field in FIXED
    try:
        Space.of(recipe_of({field: [None]}))
    except RecipeError as error:
        assert ("cannot be swept" in str(error)) == refused
    else:
        assert not refused
