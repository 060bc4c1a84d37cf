"""Population: values of trials at a step in, who goes on with whose weights and values out.

Population based training (Jaderberg et al., arXiv 1711.09846), with truncation selection: of the
worse part of a population each trial takes weights, optimizer state and values of one of the better
part, and goes on with values a little off. There, trials that are ready look at what others have
just then. Here all meet at the same steps, so that who takes what from whom follows from numbers
and `train.seed`, however many run at once. No Ray, no torch, no clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.sweeping.searching import REDRAWN
from raytune_ft.sweeping.space import Choice, Range, Space, with_values

PARTS = 8
"""Of a trial's steps, between which a population is compared."""
SHARE = 4
"""One of so many is taken from, and as many take."""
LEAST = SHARE
"""Trials of a population."""
FACTORS = (0.8, 1.2)
"""By which a number of a range moves, as in the paper."""

MOVABLE = (
    "train.lr", "train.min_lr", "train.weight_decay", "train.max_norm", "lora.dropout",
    "lora.loraplus_lr_ratio",
)  # fmt: skip
"""Fields that each step reads anew, and that nothing which is carried on depends on."""
WHY_NOT = {
    "train.betas": "Adam's averages belong to the betas that they were gathered with",
    "train.optimizer": "what one optimizer keeps is of no use to another",
    "train.epochs": "it says how many steps a trial has",
    "train.max_steps": "it says how many steps a trial has",
    "train.micro_batch_size": "it says which rows are a step",
    "train.accumulation": "it says which rows are a step",
    "train.seed": "it says in which order rows come",
    "train.warmup_ratio": "the warm-up is behind a trial by then",
    "train.warmup_steps": "the warm-up is behind a trial by then",
    "train.objective": "it is what is learned",
    "train.beta": "it is what is learned, and what losses are measured by",
    "lora.alpha": "the same adapter's weights are another model by it",
    "lora.use_rslora": "the same adapter's weights are another model by it",
    "lora.": "it is the adapter's shape, or how it begins",
    "data.": "it says which rows come",
    "model.": "it says which network is trained",
}
"""Field, or what it begins with -> why it cannot change in the middle of a run."""


def check(recipe: Recipe) -> None:
    """Refuse what is not sound in a population; RecipeError says in one line why.

    Args:
        recipe: of a sweep whose space can be and whose metric is measured.
    """
    section, pbt = recipe.tune, "tune.scheduler 'pbt'"
    for field in section.space:
        if field not in MOVABLE:
            why = next((w for name, w in WHY_NOT.items() if field.startswith(name)), None)
            raise RecipeError(
                f"tune.space: '{field}' cannot change in the middle of a run, as {pbt} has it: "
                f"{why or 'it is for a whole run'}; sweep it with tune.scheduler: asha"
            )
    if section.search != "random":
        raise RecipeError(
            f"tune.search: '{section.search}' chooses values that {pbt} moves on; set tune.search: "
            "random, or tune.scheduler: asha"
        )
    if section.trials < LEAST:
        raise RecipeError(
            f"tune.trials: {section.trials} are no population; {pbt} needs {LEAST} or more"
        )
    if section.shared_base:
        raise RecipeError(
            f"tune.shared_base: trials of {pbt} end and begin again at each comparison, each in a "
            "process of its own; set tune.shared_base: false"
        )
    if recipe.eval.patience is not None:
        raise RecipeError(
            f"eval.patience: would end trials of {pbt} that others are compared with; set it to "
            "null"
        )
    if recipe.eval.export != "last":
        raise RecipeError(
            f"eval.export: '{recipe.eval.export}' may be weights of before a trial went on with "
            f"others, under {pbt}; set eval.export: last"
        )


def rungs_of(total_steps: int) -> list[int]:
    """Return the steps at, or first measured behind, which trials are compared: every eighth."""
    steps = {max(1, part * total_steps // PARTS) for part in range(1, PARTS)}
    return sorted(step for step in steps if step < total_steps)


def comparisons(recipe: Recipe, total_steps: int) -> list[int]:
    """Predict the steps behind which trials of so many steps will be compared.

    One measurement counts for all that was due by then, and the last step is none of them.
    """
    every: int | str = 1 if recipe.tune.metric == "loss" else recipe.eval.every
    if isinstance(every, str):
        every = max(1, round(total_steps / recipe.train.epochs))
    steps = {-(-rung // every) * every for rung in rungs_of(total_steps)}
    return sorted(step for step in steps if step < total_steps)


def exploits(values: Mapping[int, float], mode: str, key: str) -> dict[int, int]:
    """Return the trials that go on with another one's weights, and whose.

    Args:
        values: of the trials that are compared, by their numbers.
        mode: `min` or `max`, the good end of values.
        key: what draws follow from.
    """
    worth = {number: _worth(value, mode) for number, value in values.items()}
    order = sorted(worth, key=lambda number: (worth[number], number))
    if len(order) < 2:  # the others failed
        return {}
    count = max(1, len(order) // SHARE)
    best = [number for number in order[:count] if math.isfinite(worth[number])]
    found = {}
    for loser in sorted(order[-count:]) if best else []:
        winner = best[int(_drawn(f"{key}/{loser}") * len(best))]
        if worth[winner] < worth[loser]:
            found[loser] = winner
    return found


def moved(space: Space, recipe: Recipe, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return values a little off from those of a trial, within the space.

    Numbers of a range are multiplied by 0.8 or 1.2, of one with steps by at least a step; of
    choices a neighbour is taken. Ties follow. Where no recipe has what was drawn, it is drawn
    again, and in the end the values stay as they are.
    """
    for again in range(REDRAWN):
        drawn = {
            field: _moved(choice, values[field], _drawn(f"{key}/{again}/{field}"))
            for field, choice in space.choices.items()
        }
        found = space.values(drawn, recipe)
        try:
            with_values(recipe, found)
        except RecipeError:
            continue
        return found
    return dict(values)


def _moved(choice: Choice, value: Any, u: float) -> Any:
    up = u >= 0.5
    if not isinstance(choice, Range):
        return _neighbour(choice, choice.index(value), up=up)
    goal = value * FACTORS[up]
    if choice.step is None:
        return min(max(goal, choice.low), choice.high)
    steps = choice.steps()
    here, there = _nearest(steps, value), _nearest(steps, goal)
    return steps[there] if there != here else _neighbour(steps, here, up=up)


def _neighbour(among: Sequence[Any], place: int, *, up: bool) -> Any:
    """Return what stands beside a place; at an end the one that there is."""
    there = place + (1 if up else -1)
    if not 0 <= there < len(among):
        there = 2 * place - there
    return among[there] if 0 <= there < len(among) else among[place]


def _nearest(steps: Sequence[float], value: float) -> int:
    return min(range(len(steps)), key=lambda place: abs(steps[place] - value))


def _worth(value: float, mode: str) -> float:
    """Return a value whose lower end is good; of no finite one the worst."""
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def _drawn(key: str) -> float:
    return random.Random(key).random()  # noqa: S311, of a text: hashed by SHA-512, on any machine
