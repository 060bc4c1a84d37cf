"""Importance on spaces whose answer is known: shares, order, chance, categories, ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.sweeping.importance import LEAST, Share, grouped, importance, ranked


def space(n: int, seed: int) -> tuple[list[dict[str, Any]], np.random.Generator]:
    """Trials over a learning rate, a rank of three choices, a word and a number without effect."""
    random = np.random.default_rng(seed)
    drawn = [
        {
            "train.lr": float(10 ** random.uniform(-5, -2)),
            "lora.r": int(random.choice([4, 8, 16])),
            "train.scheduler": str(random.choice(["cosine", "linear"])),
            "lora.dropout": float(random.uniform(0, 0.2)),
        }
        for _ in range(n)
    ]
    return drawn, random


def by_name(found: list[Share]) -> dict[str, Share]:
    return {one.name: one for one in found}


@pytest.mark.parametrize(("n", "least"), [(8, 12), (16, 19), (40, 20), (100, 20)])
def test_a_best_rate_in_between_is_found(n: int, least: int) -> None:
    """A straight line would see nothing: too low is as bad as too high.

    Of 8 trials it comes first in 7 of 10 sweeps and is seldom told from chance, which is said.
    """
    first, sure = 0, 0
    for seed in range(20):
        trials, random = space(n, seed)
        loss = [(math.log10(t["train.lr"]) + 3.5) ** 2 + 0.05 * random.normal() for t in trials]
        found = importance(trials, loss)
        first += found[0].name == "train.lr"
        sure += by_name(found)["train.lr"].is_sure
    assert first >= least
    assert sure >= (0 if n == 8 else least)


def test_shares_are_those_of_the_variance() -> None:
    """Two fields that add up: their shares of the variance are 0.8 and 0.2 by construction.

    Ranks of a sum and six groups of a line lose a few hundredths each.
    """
    shares = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        a, b = random.uniform(size=(2, 60))
        trials = [{"a": float(x), "b": float(y)} for x, y in zip(a, b, strict=True)]
        found = by_name(importance(trials, (2 * a + b).tolist()))
        shares.append((found["a"].share, found["b"].share))
    mean = np.mean(shares, axis=0)
    assert mean == pytest.approx([0.8, 0.2], abs=0.06)


def test_what_decides_nothing_has_no_share_and_is_called_chance() -> None:
    shares, sure = [], 0
    for seed in range(60):
        trials, random = space(24, seed)
        found = importance(trials, random.normal(size=24).tolist())
        shares += [one.share for one in found]
        sure += sum(one.is_sure for one in found)
    assert np.mean(shares) < 0.06
    assert sure / len(shares) < 0.09, "5% by construction"


def test_a_category_counts_by_its_words() -> None:
    trials, _ = space(30, 1)
    loss = [0.0 if t["train.scheduler"] == "cosine" else 1.0 for t in trials]
    found = importance(trials, loss)
    assert found[0].name == "train.scheduler" and found[0].share == pytest.approx(1.0)


def test_fields_that_move_together_are_one() -> None:
    trials, _ = space(16, 3)
    tied = [{**t, "lora.alpha": 2 * t["lora.r"]} for t in trials]
    found = by_name(importance(tied, [t["lora.r"] for t in tied]))
    assert found["lora.r"].with_it == ["lora.alpha"] and "lora.alpha" not in found


@pytest.mark.parametrize("n", range(LEAST))
def test_of_few_trials_nothing_is_said(n: int) -> None:
    trials, _ = space(n, 0)
    assert importance(trials, list(range(n))) == []


def test_trials_that_are_as_good_as_each_other_say_nothing() -> None:
    trials, _ = space(12, 0)
    assert importance(trials, [1.0] * 12) == []


def test_a_field_of_one_value_is_left_out() -> None:
    trials, _ = space(12, 0)
    assert "x" not in by_name(importance([{**t, "x": 3} for t in trials], list(range(12))))


@given(seed=st.integers(0, 10_000), n=st.integers(LEAST, 40))
def test_only_the_order_counts(seed: int, n: int) -> None:
    """One trial that diverged, or another unit, changes nothing."""
    trials, random = space(n, seed)
    loss = np.sort(random.normal(size=n))[random.permutation(n)]
    wild = np.where(loss == loss.max(), 1e9, np.exp(loss))
    assert importance(trials, loss.tolist()) == importance(trials, wild.tolist())


@given(seed=st.integers(0, 10_000), n=st.integers(LEAST, 40))
def test_shares_are_shares(seed: int, n: int) -> None:
    trials, random = space(n, seed)
    order = random.integers(0, 4, size=n).astype(float).tolist()
    for one in importance(trials, order):
        assert 0 <= one.share <= 1 and 0 <= one.by_chance <= 1


def test_ranks_share_ties_and_groups_are_even() -> None:
    assert ranked([3.0, 1.0, 3.0, 0.0]).tolist() == [2.5, 1.0, 2.5, 0.0]
    sizes = np.bincount(grouped([float(x) for x in range(20)]))
    assert len(sizes) == 4 and sizes.max() - sizes.min() == 0
    assert grouped([8.0, 4.0, 8.0, 16.0] * 5).tolist() == [0, 1, 0, 2] * 5
