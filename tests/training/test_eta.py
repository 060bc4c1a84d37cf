"""ETA and totals: simulated runs whose end is known, and what the ETA said on the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.training.course import progress
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.watching.eta import Eta


@dataclass(frozen=True)
class Hooks:
    """Hooks that take the time they are told to."""

    sample: Callable[[int, str], None]
    validate: Callable[[int], None]
    benchmark: Callable[[int], None]
    save: Callable[[int], None]


@dataclass
class Simulated:
    """A run whose clock is ours, in the order of `loop.train`."""

    recipe: Recipe
    steps_per_epoch: int
    step_seconds: Callable[[int], float]
    costs: dict[str, float] = field(default_factory=dict)
    exact: bool = True
    start: int = 0
    now: float = 0.0

    def told(self) -> Iterator[tuple[int, float, float]]:
        """Yield (step, moment, ETA) behind each step; `now` is the end when it is exhausted."""
        train = self.recipe.train
        total = train.max_steps or train.epochs * self.steps_per_epoch
        eta = Eta(self.recipe, lambda: self.now)
        hooks = eta.timed_hooks(
            Hooks(*map(self._taking, ("sample", "validate", "benchmark", "save")))
        )
        if self.start == 0:
            hooks.sample(0, "before")
        for step in range(self.start + 1, total + 1):
            self.now += self.step_seconds(step)
            last, ends = step == total, step % self.steps_per_epoch == 0
            if last or _due(self.recipe.eval.every, step, ends):
                hooks.validate(step)
            progress = step / self.steps_per_epoch
            share = step / total
            yield step, self.now, eta.left(step, progress, share, total, exact=self.exact)
            if _due(self.recipe.chat_eval.every or "never", step, ends) and not last:
                hooks.sample(step, "step")
            if last or ends:
                hooks.benchmark(step)
            if last or _due(self.recipe.checkpoint.every, step, ends):
                hooks.save(step)
        hooks.sample(total, "after")

    def _taking(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.now += self.costs.get(name, 0.0)

        return hook


def _due(every: int | str, step: int, ends: bool) -> bool:
    return (every == "epoch" and ends) if isinstance(every, str) else step % every == 0


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    train = {"epochs": 3, **sections.pop("train", {})}
    body: dict[str, Any] = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}}
    return Recipe.model_validate({**body, "train": train, **sections})


def errors(run: Simulated, shares: tuple[float, ...] = (0.25, 0.5, 0.75)) -> list[float]:
    """Relative error of the ETA where these shares of the steps are done."""
    told = list(run.told())
    found = []
    for share in shares:
        _, moment, eta = told[round(share * len(told)) - 1]
        found.append(abs(eta - (run.now - moment)) / (run.now - moment))
    return found


def noisy(mean: float, spread: float, seed: int = 0) -> Callable[[int], float]:
    times = mean * np.random.default_rng(seed).lognormal(-(spread**2) / 2, spread, 10_000)
    return lambda step: float(times[step])


def cold(step_seconds: Callable[[int], float], first: int = 1) -> Callable[[int], float]:
    return lambda step: 60.0 if step == first else step_seconds(step)


WORK = {"eval": {"every": 20}, "chat_eval": {"every": 50}, "checkpoint": {"every": 25}}
COSTS = {"sample": 20.0, "validate": 15.0, "save": 8.0, "benchmark": 30.0}
RUNS = {
    "even steps": Simulated(recipe_of(), 100, cold(lambda _: 2.0)),
    "noisy steps": Simulated(recipe_of(), 100, cold(noisy(2.0, 0.3))),
    "total estimated": Simulated(recipe_of(), 100, cold(noisy(2.0, 0.1)), exact=False),
    "sampling, validation, saving": Simulated(
        recipe_of(**WORK), 100, cold(noisy(2.0, 0.1)), COSTS
    ),
    "work once an epoch": Simulated(
        recipe_of(chat_eval={"every": None}, train={"epochs": 10}), 20, noisy(1.0, 0.05),
        {"validate": 12.0, "save": 5.0, "benchmark": 9.0},
    ),
    "max_steps inside the epochs": Simulated(
        recipe_of(train={"max_steps": 130}, **WORK), 100, cold(noisy(2.0, 0.1)),
        {**COSTS, "benchmark": 0.0},
    ),
    "taken up in the middle": Simulated(
        recipe_of(**WORK), 100, cold(noisy(2.0, 0.1), first=151),
        {"validate": 15.0, "save": 8.0}, start=150,
    ),
    "few steps": Simulated(recipe_of(train={"epochs": 1}), 8, cold(noisy(2.0, 0.03))),
    "short last steps of epochs": Simulated(
        recipe_of(train={"epochs": 20}), 10, lambda step: 0.5 if step % 10 == 0 else 2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_eta_is_within_a_tenth_of_the_truth(name: str) -> None:
    found = errors(RUNS[name])
    print(f"{name}: {', '.join(f'{error:.1%}' for error in found)} off at 25, 50, 75 %")
    assert max(found) < 0.1


def test_a_stall_and_a_first_step_are_no_habit() -> None:
    """A minute of compiling or of a frozen disk must not be multiplied by the steps to come."""
    stalled = Simulated(recipe_of(), 100, lambda step: 300.0 if step in (1, 74) else 2.0)
    assert max(errors(stalled)) < 0.25


def test_the_end_of_the_last_step_still_has_its_checkpoint_and_answers_to_come() -> None:
    run = Simulated(recipe_of(**WORK), 100, lambda _: 2.0, COSTS)
    *_, (_, moment, eta) = run.told()
    assert eta == pytest.approx(run.now - moment) and eta == pytest.approx(20 + 8 + 30)


def test_steps_that_became_slower_are_believed() -> None:
    """A longer curriculum, a shared machine: the last steps count, not the mean of all."""
    run = Simulated(recipe_of(), 100, lambda step: 1.0 if step < 150 else 3.0)
    _, _, late = errors(run)
    assert late < 0.01


@pytest.mark.parametrize(
    ("step", "changes", "counted", "known", "told"),
    [
        (10, {}, None, None, (1 / 6, 60, False)),
        (11, {}, None, None, (11 / 60, 60, False)),
        (10, {}, None, 61, (1 / 6, 61, True)),  # small files: packs of all epochs are known
        (10, {}, 62, None, (10 / 62, 62, True)),  # data.compat
        (10, {"eval": {"patience": 2}, "data": {"validation": 0.1}}, None, 61, (1 / 6, 61, False)),
        (
            10,
            {"eval": {"patience": 2}, "data": {"validation": 0.1}},
            62,
            None,
            (10 / 62, 62, False),
        ),
    ],
)
def test_a_total_is_sure_only_where_it_is_known(
    step: int,
    changes: dict[str, Any],
    counted: int | None,
    known: int | None,
    told: tuple[float, int, bool],
) -> None:
    data = {"sources": [{"path": "d"}], **changes.get("data", {})}
    recipe = recipe_of(**{**changes, "data": data})
    state = TrainState(step=step, progress=3 * step / 60)
    assert progress(state, counted, recipe, known) == (pytest.approx(told[0]), *told[1:])


def test_the_end_is_sure_however_it_came() -> None:
    """Early stopping, `max_steps`, the last row: the share is 1 and the total is what was done."""
    ends = [
        (recipe_of(), TrainState(step=20, progress=1.0, stopped=True)),
        (recipe_of(train={"max_steps": 20}), TrainState(step=20, progress=1.0)),
        (recipe_of(), TrainState(step=20, epoch=3, progress=3.0)),
    ]
    assert [progress(state, None, recipe, 60) for recipe, state in ends] == [(1.0, 20, True)] * 3
