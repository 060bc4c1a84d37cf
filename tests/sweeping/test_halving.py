"""Who goes on depends on numbers and values alone, not on who was faster."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.sweeping.halving import Halving, rungs_of

TOTAL = 8


def run(order: random.Random, values: list[list[float]], mode: str = "min") -> list[int]:
    """Let trials step in a random order until each is over; return where each was stopped."""
    halving = Halving(rungs_of(TOTAL), mode)
    steps = dict.fromkeys(range(len(values)), 0)
    while steps:
        trial = order.choice(list(steps))
        steps[trial] += 1
        step = steps[trial]
        on = halving.on_value(trial, step, values[trial][step - 1])
        if not on or step == TOTAL:
            halving.on_end(trial)
            del steps[trial]
    assert all(halving.is_settled(trial) for trial in range(len(values)))
    ends = [halving.stopped_at(trial) for trial in range(len(values))]
    return [TOTAL if end is None else end[0] for end in ends]


def by_hand(values: list[list[float]]) -> list[int]:
    """The same, told without any clock: one trial after the other."""
    ends = []
    at: dict[int, list[float]] = {2: [], 4: []}
    for curve in values:
        end = TOTAL
        for rung, seen in at.items():
            seen.append(curve[rung - 1])
            if sorted(seen).index(seen[-1]) >= math.ceil(len(seen) / 2):
                end = rung
                break
        ends.append(end)
    return ends


curves = st.lists(st.lists(st.floats(0, 9), min_size=TOTAL, max_size=TOTAL), min_size=1, max_size=7)


@given(curves=curves, seed=st.integers(0, 10**6))
def test_any_order_of_arrival_stops_the_same_trials(curves: list[list[float]], seed: int) -> None:
    order = random.Random(seed)
    assert run(order, curves) == by_hand(curves)


@given(curves=curves)
def test_max_is_min_turned_round(curves: list[list[float]]) -> None:
    turned = [[-value for value in curve] for curve in curves]
    order = random.Random(0)
    assert run(order, turned, "max") == by_hand(curves)


@pytest.mark.parametrize(
    ("total", "rungs"), [(1, []), (2, [1]), (4, [1, 2]), (10, [2, 5]), (100, [25, 50])]
)
def test_rungs_stand_at_a_quarter_and_a_half(total: int, rungs: list[int]) -> None:
    assert rungs_of(total) == rungs


def test_a_value_counts_at_every_rung_it_has_passed() -> None:
    halving = Halving([2, 4])
    assert halving.on_value(0, 5, 1.0)  # measured at the end of an epoch, say
    halving.on_end(0)
    assert not halving.on_value(1, 5, 2.0)
    assert halving.stopped_at(1) == (5, 2.0)


def test_who_waits_for_a_lower_number_trains_on() -> None:
    halving = Halving([2])
    assert halving.on_value(1, 2, 9.0)
    assert not halving.is_settled(1)
    assert halving.on_value(1, 3, 8.0)
    assert halving.on_value(0, 2, 1.0)
    assert halving.stopped_at(1) == (2, 9.0)


def test_a_trial_that_failed_before_the_rung_is_not_waited_for() -> None:
    halving = Halving([2])
    halving.on_value(1, 2, 9.0)
    halving.on_end(0)
    assert halving.is_settled(1)
    assert halving.goes_on(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_the_worst(value: float) -> None:
    halving = Halving([2])
    assert not halving.on_value(0, 2, value)
    assert halving.on_value(1, 2, 5.0)


def test_a_value_told_again_changes_nothing() -> None:
    halving = Halving([2])
    halving.on_value(0, 2, 5.0)
    assert not halving.on_value(1, 2, 6.0)
    assert not halving.on_value(1, 2, 1.0)
