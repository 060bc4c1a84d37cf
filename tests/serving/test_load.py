"""Small forms of the soaks: overload, clients that leave, and a replica that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from raytune_ft.chat import ChatModel
from raytune_ft.serving.engines.batched import BatchedEngine
from raytune_ft.serving.options import ApiOptions
from tests.serving.conftest import Live
from tests.soak.load import (
    closed_loop,
    leave_streams,
    ledger,
    open_loop,
    replicas,
    until,
    whole_again,
)
from tests.soak.local import served_locally


def test_overload_is_refused_and_nothing_is_lost(endless: ChatModel) -> None:
    engine = BatchedEngine(endless, 2, slots=2)
    options = ApiOptions(max_waiting=2, access_log="/dev/null")
    with served_locally(engine, options) as url:
        seen = asyncio.run(open_loop(url, "tiny", per_second=60, seconds=2, max_tokens=60))
    engine.close()
    count = ledger(seen)
    assert len(seen) == 120
    assert set(count) == {"whole", "refused"}
    refused = [one for one in seen if one.outcome == "refused"]
    assert {one.status for one in refused} == {429}
    assert all(one.retry_after for one in refused)


def test_clients_that_leave_give_their_places_back(endless: ChatModel) -> None:
    engine = BatchedEngine(endless, 16, slots=8)

    def nobody() -> bool:
        load = engine.load()
        return load.running + load.waiting == 0

    async def leave(url: str) -> tuple[int, float | None]:
        begun = await leave_streams(url, "tiny", n_clients=30, at_once=10)
        return begun, await until(nobody, 2.0)

    with served_locally(engine, ApiOptions(access_log="/dev/null")) as url:
        begun, after = asyncio.run(leave(url))
    engine.close()
    assert begun == 30
    assert after is not None


@pytest.mark.ray
def test_a_killed_replica_ends_its_answers_in_words(live: Live) -> None:
    """Every request is answered or told; another replica takes over by itself."""
    (victim,) = replicas(live.process.pid)

    async def strike() -> tuple[list[str], float | None]:
        stop = time.monotonic() + 4
        load = asyncio.ensure_future(
            closed_loop(live.url, live.model, 4, lambda: time.monotonic() < stop, max_tokens=200)
        )
        await asyncio.sleep(1.5)
        os.kill(victim, signal.SIGKILL)
        outcomes = [one.outcome for one in await load]
        return outcomes, await whole_again(live.url, live.model, 90)

    outcomes, after = asyncio.run(strike())
    assert set(outcomes) <= {"whole", "refused", "error"}
    assert set(outcomes) & {"refused", "error"}
    assert after is not None
    (again,) = replicas(live.process.pid)
    assert again != victim
