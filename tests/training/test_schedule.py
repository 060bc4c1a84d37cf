"""The learning rate is a closed formula; torch's own scheduler must agree with it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import TrainSection
from raytune_ft.training.schedule import lr_at


@pytest.mark.parametrize("total", [1, 7, 100])
def test_cosine_equals_torch(total: int) -> None:
    train = TrainSection(lr=2e-4, min_lr=1e-6)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=train.min_lr)
    for step in range(total):
        assert lr_at(step, total, train) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@given(
    total=st.integers(1, 500), ratio=st.floats(0, 0.5), kind=st.sampled_from(["cosine", "linear"])
)
def test_warmup_rises_then_lr_falls_to_its_floor(total: int, ratio: float, kind: str) -> None:
    train = TrainSection(lr=1e-3, min_lr=1e-5, warmup_ratio=ratio, scheduler=kind)
    rates = [lr_at(step, total, train) for step in range(total)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= train.lr * (1 + 1e-12) for rate in rates)
    if math.ceil(ratio * total) < total:  # otherwise the run ends while lr still rises
        assert lr_at(total, total, train) == pytest.approx(train.min_lr)


def test_constant_stays() -> None:
    train = TrainSection(lr=1e-3, scheduler="constant")
    assert {lr_at(step, 10, train) for step in range(10)} == {1e-3}
