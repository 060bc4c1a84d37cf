"""The learning rate is a closed formula; torch's own scheduler must agree with it.

Where the number of steps is known the formula goes by steps, else by rows; with equal rows in each
step both give the same rates, so what is shown of one holds for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config import loader
from raytune_ft.config.schema import TrainSection
from raytune_ft.training.schedule import (
    Moment,
    count_warmup,
    expected_steps,
    in_warmup,
    lr_at,
    share_of,
)

Rates = Callable[[int, TrainSection], list[float]]


def by_steps(total: int, train: TrainSection) -> list[float]:
    """Rates of all steps and the one behind the last, their number being known."""
    return [lr_at(Moment.of_steps(step, total, train), train) for step in range(total + 1)]


def by_rows(ends: Sequence[float], train: TrainSection) -> list[float]:
    """Rates of steps that end when these shares of the rows are visited, as the loop asks them."""
    rates, before, warm = [], 0.0, None
    for step, end in enumerate([*ends, ends[-1]]):
        moment = Moment(step, before, share_of(step + 1, end, train), warm)
        rates.append(lr_at(moment, train))
        if in_warmup(moment, train):
            warm = moment.behind
        before = moment.behind
    return rates


def by_equal_rows(total: int, train: TrainSection) -> list[float]:
    return by_rows([train.epochs * (step + 1) / total for step in range(total)], train)


either = pytest.mark.parametrize("rates_of", [by_steps, by_equal_rows])


@either
@pytest.mark.parametrize("total", [1, 7, 100])
def test_cosine_equals_torch(total: int, rates_of: Rates) -> None:
    train = TrainSection(lr=2e-4, min_lr=1e-6)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=train.min_lr)
    for rate in rates_of(total, train)[:total]:
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@given(
    total=st.integers(1, 500), ratio=st.floats(0, 0.5), kind=st.sampled_from(["cosine", "linear"])
)
def test_warmup_rises_then_lr_falls_to_its_floor(total: int, ratio: float, kind: str) -> None:
    values: dict[str, Any] = {"warmup_ratio": ratio, "scheduler": kind}
    train = TrainSection(lr=1e-3, min_lr=1e-5, **values)
    *rates, floor = by_steps(total, train)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= train.lr * (1 + 1e-12) for rate in rates)
    if math.ceil(ratio * total) < total:  # otherwise the run ends while lr still rises
        assert floor == pytest.approx(train.min_lr)


WARM = TrainSection(lr=2e-4, min_lr=1e-6, warmup_steps=4, warmup_ratio=0.9)


@either
def test_the_rates_of_a_run_with_warmup_steps_are_exactly_these(rates_of: Rates) -> None:
    """Four rising steps go before `warmup_ratio`; then half a cosine over the other six."""
    rising = [2e-4 * share for share in (0.25, 0.5, 0.75, 1.0)]
    shares = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    falling = [1e-6 + (2e-4 - 1e-6) * share for share in shares]
    rates = rates_of(10, WARM)
    assert rates[:10] == pytest.approx(rising + falling, rel=1e-12)
    assert (rates[4], rates[10]) == (WARM.lr, WARM.min_lr)


@either
@pytest.mark.parametrize("total", [150, 1000])
def test_warmup_steps_give_the_rates_of_transformers_one_step_earlier_while_they_rise(
    total: int, rates_of: Rates
) -> None:
    """Its first optimizer step has the rate 0 and changes nothing; ours begins one step on."""
    from transformers import get_cosine_schedule_with_warmup

    train = TrainSection(lr=3e-4, warmup_steps=100)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 100, total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates_of(total, train)[:total]
    assert ours[:100] == pytest.approx(theirs[1:101], rel=1e-9)
    assert ours[100:] == pytest.approx(theirs[100:], rel=1e-9)


@either
def test_a_run_may_end_while_the_rate_still_rises(rates_of: Rates) -> None:
    train = TrainSection(lr=1e-3, warmup_steps=100)
    assert rates_of(3, train)[:3] == pytest.approx([1e-5, 2e-5, 3e-5])


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 0), ({"warmup_ratio": 0.05}, 3), ({"warmup_steps": 0, "warmup_ratio": 0.5}, 0)],
)
def test_steps_go_before_the_share(given: dict[str, float], steps: int) -> None:
    assert count_warmup(50, TrainSection.model_validate(given)) == steps


@pytest.mark.parametrize(
    "name",
    [
        "internlm_7b_qlora_oasst1_e3_hf",
        "llama2_70b_int8_lora_open_platypus_e1_hf",
        "llama2_70b_qlora_open_platypus_e1_hf",
    ],
)
def test_the_recipes_of_transformers_trainer_warm_up_for_a_hundred_steps(name: str) -> None:
    assert loader.load_recipe(name).train.warmup_steps == 100


def test_constant_stays() -> None:
    train = TrainSection(lr=1e-3, scheduler="constant")
    assert set(by_steps(10, train) + by_equal_rows(10, train)) == {1e-3}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"scheduler": "linear", "min_lr": 1e-5},
    {"warmup_ratio": 0.05},
    {"warmup_ratio": 0.03, "scheduler": "linear"},
    {"warmup_steps": 7},
    {"warmup_steps": 40, "max_steps": 30},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("total", [1, 22, 997])
def test_equal_rows_give_the_rates_of_steps(settings: dict[str, Any], total: int) -> None:
    train = TrainSection(lr=1e-3, **settings)
    total = min(total, train.max_steps or total)
    rows, steps = by_equal_rows(total, train), by_steps(total, train)
    assert max(abs(a - b) for a, b in zip(rows, steps, strict=True)) <= 1e-12
    assert rows[0] > 0.0


@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=str)
def test_ragged_rows_stay_near_the_rates_of_steps(settings: dict[str, Any]) -> None:
    """Steps of 16 packs, whose rows spread lognormally; the last step of an epoch is short.

    Where rates fall, a step's share strays by a random walk: under 1 % of `lr` in 600 steps. Where
    they rise, `lr` is at most one and a half steps early or late.
    """
    train = TrainSection(lr=1e-3, epochs=3, **settings)
    sizes = np.random.default_rng(1).lognormal(0.0, 0.5, (3, 200, 16)).sum(axis=2)
    sizes[:, -1] /= 4
    shares = np.cumsum(sizes, axis=1) / sizes.sum(axis=1, keepdims=True)
    ends = (shares + np.arange(3)[:, None]).ravel()
    rows, steps = np.array(by_rows(ends.tolist(), train)), np.array(by_steps(600, train))
    away = np.abs(rows - steps) / train.lr
    warm = count_warmup(600, train)
    rising, falling = away[:warm].max(initial=0.0), away[warm:].max()
    print(f"{settings}: from the rates by steps {rising:.2%} of lr in warm-up, {falling:.2%} later")
    assert 0 < falling < 0.01
    assert rising <= 1.5 / max(1, warm)
    assert rows[:-1].min() > 0.0


@pytest.mark.parametrize(
    ("step", "epochs_done", "max_steps", "told"),
    [
        (5, 0.5, None, (30, False)),
        (30, 3.0, None, (30, True)),
        (29, 2.999, None, (30, False)),  # never the step itself before the end
        (5, 0.1, 10, (10, True)),
        (5, 1.4, 10, (10, False)),  # the epochs may end first
        (10, 1.4, 10, (10, True)),
    ],
)
def test_steps_of_a_run_are_told_from_those_done(
    step: int, epochs_done: float, max_steps: int | None, told: tuple[int, bool]
) -> None:
    train = TrainSection(epochs=3, max_steps=max_steps)
    assert expected_steps(step, epochs_done, train) == told
