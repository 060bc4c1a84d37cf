"""Searching: a space and what trials gave so far in, the values of the next trials out.

Drawn and listed values are a function of (recipe, seed, number) alone and are all there before
anything starts. Optuna's follow from what is in the ledger when they are asked for, in the
ledger's order: nothing else is kept of it, so a driver that comes later asks the same study.
"""

from __future__ import annotations

import importlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.space import Choice, Range, Space
from raytune_ft.sweeping.trials import DONE, FAILED, STOPPED, Ledger, Trial

REDRAWN = 32
"""Times that values are drawn again which an earlier trial has."""
FIRST = 8
"""Trials that Optuna draws before it looks at results; its own default is 10."""


class Search(Protocol):
    """Where values come from."""

    def planned(self) -> list[dict[str, Any]]:
        """Return the values of all trials that are known beforehand."""

    def next(self, ledger: Ledger) -> dict[str, Any] | None:
        """Return the values of the trial behind those in the ledger; None if it was the last."""


def search_for(recipe: Recipe) -> Search:
    """Return the recipe's search.

    Raises:
        RecipeError: the space cannot be, or what `tune.search` needs is not installed.
    """
    space = Space.of(recipe)
    if recipe.tune.search == "optuna":
        _optuna()
        return Asked(space, recipe)
    if recipe.tune.search == "grid":
        return Planned(space.grid(recipe))
    return Planned(draw(space, recipe))


@dataclass(frozen=True)
class Planned:
    """Values that stand before the first trial starts."""

    values: list[dict[str, Any]]

    def planned(self) -> list[dict[str, Any]]:
        return self.values

    def next(self, ledger: Ledger) -> dict[str, Any] | None:
        number = len(ledger.trials)
        return self.values[number] if number < len(self.values) else None


def draw(space: Space, recipe: Recipe) -> list[dict[str, Any]]:
    """Draw the values of all trials; none twice, as long as the space has others.

    A field's number depends on the seed, the trial's number and the field's name, so that another
    field in the space leaves it as it is.
    """
    drawn: list[dict[str, Any]] = []
    known: set[str] = set()
    for number in range(recipe.tune.trials):
        for again in range(REDRAWN):
            values = {
                field: _at(choice, f"{recipe.train.seed}/{number}/{again}/{field}")
                for field, choice in space.choices.items()
            }
            name = json.dumps(values, sort_keys=True)
            if name not in known:
                break
        known.add(name)
        drawn.append(space.values(values, recipe))
    return drawn


def _at(choice: Choice, key: str) -> Any:
    u = random.Random(key).random()  # noqa: S311, of a text: hashed by SHA-512, on any machine
    return choice.at(u) if isinstance(choice, Range) else choice[int(u * len(choice))]


@dataclass(frozen=True)
class Asked:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""

    space: Space
    recipe: Recipe

    def planned(self) -> list[dict[str, Any]]:
        return []

    def next(self, ledger: Ledger) -> dict[str, Any] | None:
        """Ask a study made anew of the ledger, whose sampler's seed is of this number."""
        number = len(ledger.trials)
        if number >= self.recipe.tune.trials:
            return None
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        seed = random.Random(f"{self.recipe.train.seed}/{number}").getrandbits(32)  # noqa: S311
        ways = {"min": "minimize", "max": "maximize"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=FIRST, constant_liar=True
            )
            study = optuna.create_study(direction=ways[self.recipe.tune.mode], sampler=sampler)
            known = {field: _distribution(each) for field, each in self.space.choices.items()}
            for trial in _in_order(ledger):
                study.add_trial(self._told(optuna, trial, known))
            asked = study.ask(known)
        drawn = {
            field: _value(self.space.choices[field], asked.params[field])
            for field in self.space.choices
        }
        return self.space.values(drawn, self.recipe)

    def _told(self, optuna: Any, trial: Trial, known: Mapping[str, Any]) -> Any:
        """Turn a trial into Optuna's; one that failed taught nothing about its values."""
        state = optuna.trial.TrialState
        params = {
            field: _param(choice, trial.values[field])
            for field, choice in self.space.choices.items()
        }
        has_value = trial.metric is not None and not trial.state.startswith(FAILED)
        kinds = {DONE: state.COMPLETE, STOPPED: state.PRUNED}
        kind = kinds.get(trial.state, state.FAIL if trial.is_over else state.RUNNING)
        if kind in kinds.values() and not has_value:
            kind = state.FAIL
        return optuna.trial.create_trial(
            state=kind,
            params=params,
            distributions=dict(known),
            value=trial.metric if kind == state.COMPLETE else None,
            intermediate_values={trial.step: trial.metric} if kind == state.PRUNED else None,
        )


def _in_order(ledger: Ledger) -> Sequence[Trial]:
    """List trials: those that are over in the order of their ends, then the others."""
    over = [ledger.trials[number] for number in ledger.over]
    return [*over, *ledger.waiting()]


def _distribution(choice: Choice) -> Any:
    distributions = _optuna().distributions
    if not isinstance(choice, Range):
        return distributions.CategoricalDistribution(tuple(range(len(choice))))
    if choice.whole:
        step = 1 if choice.step is None else int(choice.step)
        high = int(choice.low) + (int(choice.high) - int(choice.low)) // step * step
        return distributions.IntDistribution(int(choice.low), high, log=choice.log, step=step)
    highest = choice.high if choice.step is None else choice.steps()[-1]
    return distributions.FloatDistribution(choice.low, highest, log=choice.log, step=choice.step)


def _value(choice: Choice, param: Any) -> Any:
    return param if isinstance(choice, Range) else choice[param]


def _param(choice: Choice, value: Any) -> Any:
    return value if isinstance(choice, Range) else choice.index(value)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise RecipeError(
            "tune.search: 'optuna' is not installed; pip install 'raytune_ft[tune]', or use random"
        ) from None
