"""Limits of keys: requests and tokens a minute by a clock of our own, requests at a time."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.serving.keys import ApiKey, hash_key
from raytune_ft.serving.limits import Account
from raytune_ft.serving.refusal import RequestError


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def account(clock: Clock, **limits: Any) -> Account:
    return Account(ApiKey(name="a", sha256=hash_key("a"), **limits), clock)


def refused(used: Account) -> int:
    with pytest.raises(RequestError) as caught:
        used.enter()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_requests_a_minute_come_back_evenly() -> None:
    clock = Clock()
    used = account(clock, requests_per_minute=6)
    for _ in range(6):
        used.enter()
        used.leave(0)
    assert refused(used) == 10
    clock.now += 9.9
    assert refused(used) == 1
    clock.now += 0.2
    used.enter()
    clock.now += 3600
    for _ in range(6):
        used.enter()
    refused(used)


def test_tokens_are_paid_afterwards() -> None:
    clock = Clock()
    used = account(clock, tokens_per_minute=60)
    used.enter()
    used.leave(100)
    assert refused(used) == 41
    clock.now += 41
    used.enter()


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    used = account(clock, requests_per_minute=1, concurrent=1)
    used.enter()
    for _ in range(5):
        assert refused(used) == 1
    used.leave(0)
    assert refused(used) == 60
    clock.now += 60
    used.enter()


def test_without_limits_everything_passes() -> None:
    used = account(Clock())
    for _ in range(1000):
        used.enter()
        used.leave(10**6)
