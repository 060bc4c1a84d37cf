"""The learning rate is a closed formula; torch's own scheduler must agree with it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config import loader
from raytune_ft.config.schema import TrainSection
from raytune_ft.training.schedule import count_warmup, lr_at


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


WARM = TrainSection(lr=2e-4, min_lr=1e-6, warmup_steps=4, warmup_ratio=0.9)


def test_the_rates_of_a_run_with_warmup_steps_are_exactly_these() -> None:
    """Four rising steps go before `warmup_ratio`; then half a cosine over the other six."""
    rising = [2e-4 * share for share in (0.25, 0.5, 0.75, 1.0)]
    shares = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    falling = [1e-6 + (2e-4 - 1e-6) * share for share in shares]
    assert [lr_at(step, 10, WARM) for step in range(10)] == pytest.approx(
        rising + falling, rel=1e-12
    )
    assert lr_at(4, 10, WARM) == WARM.lr
    assert lr_at(10, 10, WARM) == WARM.min_lr


@pytest.mark.parametrize("total", [150, 1000])
def test_warmup_steps_give_the_rates_of_transformers_one_step_earlier_while_they_rise(
    total: int,
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
    ours = [lr_at(step, total, train) for step in range(total)]
    assert ours[:100] == pytest.approx(theirs[1:101], rel=1e-9)
    assert ours[100:] == pytest.approx(theirs[100:], rel=1e-9)


def test_a_run_may_end_while_the_rate_still_rises() -> None:
    train = TrainSection(lr=1e-3, warmup_steps=100)
    assert [lr_at(step, 3, train) for step in range(3)] == pytest.approx([1e-5, 2e-5, 3e-5])


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
    assert {lr_at(step, 10, train) for step in range(10)} == {1e-3}
