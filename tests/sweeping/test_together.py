"""Which trials share a base, and what a desk between groups and their driver tells."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping.desk import Desk
from raytune_ft.sweeping.together import LARGEST, can_share
from raytune_ft.sweeping.trials import WAITING, Trial, name_of
from tests.sweeping.made import recipe_of


def trials_of(*values: dict[str, Any]) -> list[Trial]:
    return [
        Trial(i, name_of(i), each, None, 0, WAITING, Path(name_of(i)), 0.0)
        for i, each in enumerate(values)
    ]


def numbers(recipe: Recipe, trials: list[Trial]) -> list[list[int]]:
    return [[trial.number for trial in group] for group in can_share(recipe, trials)]


def test_trials_of_one_network_and_the_same_rows_share_a_base() -> None:
    recipe = recipe_of({"train.lr": [1e-4, 1e-3], "data.max_length": [64, 128]})
    trials = trials_of(
        {"train.lr": 1e-4, "data.max_length": 64},
        {"train.lr": 1e-4, "data.max_length": 128},
        {"train.lr": 1e-3, "data.max_length": 64, "lora.r": 4},
        {"train.lr": 1e-3, "data.max_length": 64, "lora.use_dora": True},
        {"train.lr": 1e-3, "data.max_length": 128, "train.warmup_ratio": 0.1},
    )
    assert numbers(recipe, trials[::-1]) == [[0, 2], [1, 4], [3]]


def test_a_group_has_an_end() -> None:
    recipe = recipe_of({"train.lr": [1e-4, 1e-3]})
    trials = trials_of(*({"train.lr": 1e-4 * (i + 1)} for i in range(LARGEST + 2)))
    assert [len(group) for group in can_share(recipe, trials)] == [LARGEST, 2]


def test_at_a_rung_a_trial_waits_for_the_word() -> None:
    async def course() -> None:
        desk = Desk()
        assert await desk.tell(0, {"step": 1}, waits=False)
        asking = asyncio.create_task(desk.tell(1, {"step": 2}, waits=True))
        await asyncio.sleep(0)
        assert await desk.take() == [(0, {"step": 1}), (1, {"step": 2})]
        assert not asking.done()
        await desk.answer(2, [1])
        assert await asking is False
        assert await desk.tell(0, {"step": 2}, waits=False)
        assert await desk.take() == [(0, {"step": 2})]

    asyncio.run(course())
