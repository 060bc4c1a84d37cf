"""Values are a function of recipe, seed and number, or of the ledger, and of nothing else."""

from __future__ import annotations

import builtins
import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.searching import search_for
from raytune_ft.sweeping.trials import Ledger
from tests.sweeping.made import recipe_of

SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-4, "high": 1e-2, "log": 1},
    "lora.r": [4, 8, 16],
    "lora.alpha": "2 * lora.r",
    "train.betas": [[0.9, 0.999], [0.9, 0.95]],
    "lora.dropout": {"low": 0.0, "high": 0.2, "step": 0.05},
}


def sweep_of(trials: int, seed: int = 42, search: str = "random", **space: Any) -> Recipe:
    section = {"trials": trials, "search": search}
    return recipe_of({**SPACE, **space}, tune=section, train={"seed": seed})


def test_the_same_values_are_drawn_again() -> None:
    values = search_for(sweep_of(12)).planned()
    assert values == search_for(sweep_of(12)).planned()
    assert values[:5] == search_for(sweep_of(5)).planned()
    assert values != search_for(sweep_of(12, seed=1)).planned()
    assert all(v["lora.alpha"] == 2 * v["lora.r"] for v in values)
    assert len({v["train.lr"] for v in values}) == 12


def test_another_field_leaves_the_others_as_they_are() -> None:
    more = search_for(sweep_of(6, **{"train.weight_decay": [0.0, 0.1]})).planned()
    assert [{k: v[k] for k in SPACE} for v in more] == search_for(sweep_of(6)).planned()


def test_drawn_values_are_spread() -> None:
    drawn = [math.log10(v["train.lr"]) for v in search_for(sweep_of(400)).planned()]
    thirds = [sum(-4 + 2 * k / 3 <= x < -4 + 2 * (k + 1) / 3 for x in drawn) for k in range(3)]
    assert sum(thirds) == 400
    assert min(thirds) > 90  # 133 expected, with a deviation of 9.4


def test_no_values_come_twice_while_there_are_others() -> None:
    recipe = recipe_of({"lora.r": [1, 2, 3, 4]}, tune={"trials": 4})
    values = [v["lora.r"] for v in search_for(recipe).planned()]
    assert sorted(values) == [1, 2, 3, 4]


def test_a_grid_reads_no_number_of_trials() -> None:
    recipe = recipe_of({"lora.r": [1, 2, 3], "lora.dropout": [0.0, 0.1]}, tune={"search": "grid"})
    assert len(search_for(recipe).planned()) == 6


def score(values: dict[str, Any]) -> float:
    """Best at a learning rate of 1e-3."""
    return abs(math.log10(values["train.lr"]) + 3)


def asked(recipe: Recipe, folder: Path, *, again: bool) -> list[dict[str, Any]]:
    """Run a sweep of two at a time by Optuna; with `again` each question is a new driver's."""
    folder.mkdir()
    ledger = Ledger.read(folder)
    while (values := search_for(recipe).next(ledger)) is not None:
        ledger.planned([values])
        number = len(ledger.trials) - 2
        if number >= 0:
            kind = "failed" if number % 5 == 4 else "stopped" if number % 3 == 0 else "done"
            reason = "bad" if kind == "failed" else None
            metric = score(ledger.trials[number].values)
            ledger.ended(kind, number, metric=metric, step=4, reason=reason)
        ledger = Ledger.read(folder) if again else ledger
    return [trial.values for trial in ledger.trials.values()]


def test_optuna_goes_by_the_ledger_alone(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    recipe = sweep_of(24, search="optuna")
    values = asked(recipe, tmp_path / "a", again=False)
    assert values == asked(recipe, tmp_path / "b", again=True)
    assert len(values) == 24
    assert all(v["lora.alpha"] == 2 * v["lora.r"] for v in values)
    assert {tuple(v["train.betas"]) for v in values} <= {(0.9, 0.999), (0.9, 0.95)}
    late, early = values[12:], values[:8]
    assert sum(map(score, late)) / len(late) < sum(map(score, early)) / len(early)


def test_optuna_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "optuna":
            raise builtins.ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(RecipeError, match=r"^tune.search: 'optuna' is not installed; pip install"):
        search_for(sweep_of(2, search="optuna"))
