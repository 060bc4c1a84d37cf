"""Averages on the host: the paged optimizer's steps, with few parts on the device at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.estimates.setting import STATE_AHEAD
from raytune_ft.config.schema import TrainSection
from raytune_ft.training import host_state
from raytune_ft.training.optim import build_optimizer, restore, set_lr, state_of


@pytest.fixture
def sections() -> Iterator[TrainSection]:
    yield TrainSection.model_validate(
        {"optimizer": "paged_adamw_32bit", "lr": 1e-2, "weight_decay": 0.1}
    )


def test_averages_on_the_host_take_the_same_steps(
    sections: TrainSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_state, "PART", 16)
    monkeypatch.setattr(host_state, "ALIGNED", 8)
    torch.manual_seed(0)
    start = {"a": torch.randn(5, 9), "b": torch.randn(3), "c": torch.randn(2, 2)}
    sides = []
    for hosted in (False, True):
        trained = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
        optimizer = build_optimizer(trained, sections)
        if hosted:
            host_state.keep_on_host(optimizer)
        for step in range(4):
            random = torch.Generator().manual_seed(step)
            for name, parameter in trained.items():
                drawn = torch.randn(parameter.shape, generator=random)
                parameter.grad = None if (name, step) == ("c", 0) else drawn
            set_lr(optimizer, 1e-2 / (step + 1))
            optimizer.step()
        sides.append((trained, state_of(optimizer, trained), optimizer))
    (plain, its, _), (same, kept, optimizer) = sides
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert its.keys() == kept.keys()
    assert all(torch.equal(its[name], kept[name]) for name in its)
    restore(optimizer, same, its)
    again = state_of(optimizer, same)
    assert all(torch.equal(again[name], its[name]) for name in its)


def test_few_parts_of_averages_are_on_the_device_at_once(
    sections: TrainSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of memory counts five of them, whatever the number of weights."""
    monkeypatch.setattr(host_state, "PART", 64)
    trained = {name: nn.Parameter(torch.ones(100, 7)) for name in "abcdef"}
    optimizer = build_optimizer(trained, sections)
    host_state.keep_on_host(optimizer)
    here: list[weakref.ref[torch.Tensor]] = []
    most, come = [0], host_state._Part.come

    def noted(part: Any) -> None:
        come(part)
        here.extend(map(weakref.ref, part.here))
        most[0] = max(most[0], sum(one() is not None for one in here))

    monkeypatch.setattr(host_state._Part, "come", noted)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(here) == 2 * -(-6 * 704 // 64)  # each begins at a multiple of 64
    assert most[0] == 2 * (2 * STATE_AHEAD + 1)
