"""docs/scaling.md has the tables that its script prints; the simulation against formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling_model
from benchmarks.scaling_simulation import Failing, goodput, run_with_failures, slowest
from tests.conftest import ROOT

HARD = Failing(gpu_s=1000.0, restart_s=20.0, save_s=5.0)
"""Fails every 1,000 s, so that a few thousand intervals meet hundreds of failures."""


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for title, rows in scaling_model.tables():
        assert "\n".join(rows) in page, f"{title}: python -m benchmarks.scaling_model"


@pytest.mark.parametrize(("ranks", "interval"), [(1, 100.0), (1, 20.0), (4, 100.0), (16, 30.0)])
def test_a_run_with_failures_keeps_what_the_formula_says(ranks: int, interval: float) -> None:
    expected = goodput(HARD, ranks, interval)
    found = [run_with_failures(HARD, ranks, interval, segments=4000, seed=s) for s in range(3)]
    assert np.mean(found) == pytest.approx(expected, rel=0.03)
    assert found[0] == run_with_failures(HARD, ranks, interval, segments=4000, seed=0)
    assert len(set(found)) == 3


def test_without_failures_only_checkpoints_take_time() -> None:
    sound = replace(HARD, gpu_s=1e15)
    assert run_with_failures(sound, 8, 95.0, segments=10) == pytest.approx(0.95)
    assert goodput(sound, 8, 95.0) == pytest.approx(0.95)


@settings(max_examples=40)
@given(ranks=st.integers(1, 16), save=st.floats(0.5, 5))
def test_other_intervals_than_the_best_leave_less(ranks: int, save: float) -> None:
    """Of first order: an interval twice or half as long is worse, wherever checkpoints are cheap
    beside the time between failures."""
    failing = Failing(50_000.0, 20.0, save)
    best = failing.best_interval(ranks)
    assert best == pytest.approx(math.sqrt(2 * save * 50_000 / ranks))
    most = goodput(failing, ranks, best)
    assert most > goodput(failing, ranks, 2 * best) and most > goodput(failing, ranks, best / 2)
    assert most > goodput(failing, 2 * ranks, failing.best_interval(2 * ranks))


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_the_slowest_rank_is_the_largest_of_so_many_draws(ranks: int) -> None:
    """By the distribution of a maximum, F(x)^N, integrated; means are 1."""
    spread = 0.1
    sigma = math.sqrt(math.log1p(spread**2))
    x = np.linspace(0.3, 3.0, 20_001)
    z = (np.log(x) + sigma**2 / 2) / sigma
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])
    expected = 0.3 + np.trapezoid(1 - below**ranks, x)
    assert slowest(ranks, spread) == pytest.approx(expected, abs=4 * spread / math.sqrt(4000))
    assert slowest(ranks, 0.0) == pytest.approx(1.0)
