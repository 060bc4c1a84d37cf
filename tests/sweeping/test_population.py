"""Who goes on as whom follows from numbers and a key alone; values stay within the space."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.checks import check
from raytune_ft.sweeping.population import (
    MOVABLE,
    comparisons,
    exploits,
    moved,
    rungs_of,
)
from raytune_ft.sweeping.space import Space, with_values
from tests.sweeping.made import recipe_of

LR = {"train.lr": {"low": 1e-5, "high": 1e-3, "log": 1}}
values = st.dictionaries(st.integers(0, 40), st.floats(allow_nan=True), max_size=24)


def by_hand(known: dict[int, float], mode: str) -> tuple[set[int], set[int]]:
    """Take the best and the worst away, one at a time, as often as a quarter is."""

    def is_better(one: int, other: int) -> bool:
        a, b = known[one], known[other]
        if not math.isfinite(a) or not math.isfinite(b):
            return math.isfinite(a) or (not math.isfinite(b) and one < other)
        if a == b:
            return one < other
        return a < b if mode == "min" else a > b

    left, best, worst = set(known), set(), set()
    for _ in range(max(1, len(known) // 4) if len(known) > 1 else 0):
        top = next(n for n in left if all(n == o or is_better(n, o) for o in left))
        low = next(n for n in left if all(n == o or is_better(o, n) for o in left))
        best.add(top)
        worst.add(low)
        left -= {top, low}
    return {n for n in best if math.isfinite(known[n])}, worst


@given(known=values, mode=st.sampled_from(["min", "max"]), key=st.text(max_size=3))
def test_the_worse_quarter_takes_from_the_best(
    known: dict[int, float], mode: str, key: str
) -> None:
    best, worst = by_hand(known, mode)
    found = exploits(known, mode, key)
    assert set(found.values()) <= best
    alike = {n for n in worst if any(known[n] == known[w] for w in best)}
    assert worst - alike <= set(found) or not best
    assert set(found) <= worst
    assert found == exploits(dict(reversed(known.items())), mode, key)
    assert all(known[loser] != known[winner] for loser, winner in found.items())


@given(known=values)
def test_max_is_min_turned_round(known: dict[int, float]) -> None:
    turned = {number: -value for number, value in known.items()}
    assert exploits(turned, "max", "k") == exploits(known, "min", "k")


def test_each_of_the_best_is_drawn_by_the_key() -> None:
    known = {number: float(number) for number in range(16)}
    drawn = Counter(w for key in range(200) for w in exploits(known, "min", f"{key}").values())
    assert sorted(drawn) == [0, 1, 2, 3]
    assert min(drawn.values()) > 150  # of 800, 200 expected, 12 the deviation
    assert set(exploits(known, "min", "")) == {12, 13, 14, 15}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {}),
        ({3: 1.0}, {}),
        ({0: 2.0, 3: 1.0}, {0: 3}),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {}),
        ({0: math.nan, 1: math.inf, 2: math.nan, 3: math.nan}, {}),
        ({0: math.nan, 1: math.inf, 2: 5.0, 3: 1.0}, {1: 3}),
    ],
)
def test_few_alike_or_without_a_number(known: dict[int, float], expected: dict[int, int]) -> None:
    assert exploits(known, "min", "k") == expected


@pytest.mark.parametrize(
    ("total", "rungs"),
    [
        (1, []),
        (2, [1]),
        (4, [1, 2, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7]),
        (100, [12, 25, 37, 50, 62, 75, 87]),
    ],
)
def test_rungs_stand_at_every_eighth(total: int, rungs: list[int]) -> None:
    assert rungs_of(total) == rungs


def test_what_is_compared_is_what_is_measured() -> None:
    def of(every: int | str, metric: str = "val_loss", epochs: int = 3) -> list[int]:
        recipe = recipe_of(
            LR, tune={"metric": metric}, data={"validation": 0.1}, eval={"every": every},
            train={"epochs": epochs},
        )  # fmt: skip
        return comparisons(recipe, 80)

    assert of(10) == [10, 20, 30, 40, 50, 60, 70]
    assert of(25) == [25, 50, 75]
    assert of(80) == of(100) == of("epoch", epochs=1) == []
    assert of("epoch", epochs=2) == [40]
    assert of(100, metric="loss") == [10, 20, 30, 40, 50, 60, 70]


SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-4, "high": 1e-3, "log": 1},
    "train.min_lr": "0.1 * train.lr",
    "train.weight_decay": {"low": 0.0, "high": 0.2, "step": 0.05},
    "lora.dropout": [0.0, 0.1, 0.3],
    "lora.loraplus_lr_ratio": [None, 4.0],
    "train.max_norm": [1.0],
}


@settings(deadline=None)
@given(
    u=st.floats(0, 1, exclude_max=True), decay=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.1, 0.3]), ratio=st.sampled_from([None, 4.0]), key=st.text(),
)  # fmt: skip
def test_values_move_a_little_within_the_space(
    u: float, decay: int, dropout: float, ratio: float | None, key: str
) -> None:
    recipe = recipe_of(SPACE)
    space = Space.of(recipe)
    choices = space.choices
    before = space.values(
        {
            "train.lr": choices["train.lr"].at(u),  # type: ignore[union-attr]
            "train.weight_decay": choices["train.weight_decay"].steps()[decay],  # type: ignore[union-attr]
            "lora.dropout": dropout, "lora.loraplus_lr_ratio": ratio, "train.max_norm": 1.0,
        },
        recipe,
    )  # fmt: skip
    after = moved(space, recipe, before, key)
    assert after == moved(space, recipe, before, key)
    assert list(after) == list(SPACE)
    lr = before["train.lr"]
    assert after["train.lr"] in (min(1e-3, lr * 1.2), max(1e-4, lr * 0.8))
    assert after["train.min_lr"] == 0.1 * after["train.lr"]
    steps = [round(abs(after["train.weight_decay"] - before["train.weight_decay"]) / 0.05)]
    assert steps == [1]
    assert after["lora.dropout"] in {0.0: [0.1], 0.1: [0.0, 0.3], 0.3: [0.1]}[dropout]
    assert after["lora.loraplus_lr_ratio"] == (4.0 if ratio is None else None)
    assert after["train.max_norm"] == 1.0
    with_values(recipe, after)


def test_both_ways_are_drawn() -> None:
    recipe = recipe_of(LR)
    drawn = {
        moved(Space.of(recipe), recipe, {"train.lr": 1e-4}, f"{k}")["train.lr"] for k in range(40)
    }
    assert drawn == {1e-4 * 0.8, 1e-4 * 1.2}


def test_what_no_recipe_has_is_drawn_again_or_left() -> None:
    recipe = recipe_of({"train.lr": [1e-4, 2e-4], "train.min_lr": [1e-4, 2e-4]})
    space = Space.of(recipe)
    for key in range(20):  # the other way round min_lr would be above lr
        found = moved(space, recipe, {"train.lr": 2e-4, "train.min_lr": 2e-4}, f"{key}")
        assert found == {"train.lr": 2e-4, "train.min_lr": 2e-4} or found["train.min_lr"] == 1e-4


def pbt(space: dict[str, Any] | None = None, **more: Any) -> Recipe:
    tune = {"scheduler": "pbt", **more.pop("tune", {})}
    return recipe_of(space or LR, tune=tune, **more)


def test_each_field_that_may_move_may_be_swept() -> None:
    space = {field: [0.1, 0.2] for field in MOVABLE}
    check(pbt({**space, "train.lr": [0.3, 0.4], "lora.loraplus_lr_ratio": [None, 2.0]}))


@pytest.mark.parametrize(
    ("space", "why"),
    [
        ({"lora.r": [4, 8]}, "it is the adapter's shape, or how it begins"),
        ({"lora.alpha": [4, 8]}, "the same adapter's weights are another model by it"),
        ({**LR, "lora.r": [4], "lora.alpha": "2 * lora.r"}, "it is the adapter's shape"),
        ({"train.betas": [[0.9, 0.99]]}, "Adam's averages belong to the betas"),
        ({"train.optimizer": ["adamw", "lion"]}, "what one optimizer keeps"),
        ({"train.epochs": [1, 2]}, "it says how many steps a trial has"),
        ({"train.accumulation": [1, 2]}, "it says which rows are a step"),
        ({"train.seed": [1, 2]}, "it says in which order rows come"),
        ({"train.scheduler": ["linear", "cosine"]}, "it is for a whole run"),
        ({"train.warmup_ratio": [0.0, 0.1]}, "the warm-up is behind a trial by then"),
        ({"train.beta": [0.1, 0.2]}, "it is what is learned"),
        ({"data.max_length": [64, 128]}, "it says which rows come"),
        ({"model.dtype": ["float32"]}, "it says which network is trained"),
    ],
)
def test_fields_that_cannot_change_on_the_way(space: dict[str, Any], why: str) -> None:
    check(recipe_of(space))
    with pytest.raises(
        RecipeError, match=r"^tune\.space: '\S+' cannot change in the middle"
    ) as said:
        check(pbt(space))
    assert why in str(said.value)
    assert str(said.value).endswith("; sweep it with tune.scheduler: asha")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"tune": {"search": "optuna"}},
            "tune.search: 'optuna' chooses values that tune.scheduler 'pbt' moves on; set "
            "tune.search: random, or tune.scheduler: asha",
        ),
        (
            {"tune": {"trials": 3}},
            "tune.trials: 3 are no population; tune.scheduler 'pbt' needs 4 or more",
        ),
        (
            {"tune": {"shared_base": True}},
            "tune.shared_base: trials of tune.scheduler 'pbt' end and begin again at each "
            "comparison, each in a process of its own; set tune.shared_base: false",
        ),
        (
            {"eval": {"patience": 2}, "data": {"validation": 0.1}},
            "eval.patience: would end trials of tune.scheduler 'pbt' that others are compared "
            "with; set it to null",
        ),
        (
            {"eval": {"export": "best"}, "data": {"validation": 0.1}},
            "eval.export: 'best' may be weights of before a trial went on with others, under "
            "tune.scheduler 'pbt'; set eval.export: last",
        ),
        (
            {"tune": {"metric": "val_loss"}},
            "tune.metric: 'val_loss' needs held-out rows; set data.validation",
        ),
    ],
)  # fmt: skip
def test_what_a_population_cannot_be_is_refused_in_a_line(more: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as said:
        check(pbt(**more))
    assert str(said.value) == line


def test_a_grid_is_no_population() -> None:
    with pytest.raises(RecipeError, match=r"^tune\.search: 'grid' chooses values"):
        check(pbt({"train.lr": [1e-4, 1e-3]}, tune={"search": "grid"}))
