"""The long proofs of the endpoint, through Ray Serve: `make soak`, about an hour on two cores.

Each prints one line with its figures, which docs/reliability.md has.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from raytune_ft.chat import ChatModel
from tests.serving.conftest import Live
from tests.soak import load
from tests.soak.cluster import Cluster, cluster
from tests.soak.conftest import Start
from tests.soak.fuzz import fuzz
from tests.soak.ids import differences
from tests.soak.load import tell
from tests.soak.wire import Made, sent

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(7200)]
PLACES, LEVEL_S = 8, 120.0
"""Requests that are answered or wait at once, and seconds of a stretch of the overload test."""


def test_20_000_generated_requests(started: Start) -> None:
    """No 5xx, no hang, no growth (G14)."""
    with started() as live:
        (replica,) = load.replicas(live.process.pid)
        seen: Counter[int] = fuzz(lambda made: sent(live.url, made), 2_000, live.model)
        before = load.resident_mib(replica)
        seen += fuzz(lambda made: sent(live.url, made), 18_000, live.model)
        growth = load.resident_mib(replica) - before
        assert sent(live.url, Made("GET", "/readyz")).status == 200
        assert load.replicas(live.process.pid) == [replica]
    tell("fuzz", requests=sum(seen.values()), statuses=dict(seen), growth_mib=round(growth, 1))
    assert sum(seen.values()) >= 20_000
    assert growth <= 20


def test_500_clients_leave_in_the_middle(started: Start) -> None:
    """All places are free within two seconds (G17)."""

    async def leave(url: str, model: str) -> tuple[int, float, float]:
        begun = await load.leave_streams(url, model, n_clients=500, at_once=40)
        start = time.perf_counter()
        while await load.gauges(url, "running", "waiting") and time.perf_counter() - start < 10:
            await asyncio.sleep(0.02)
        return begun, time.perf_counter() - start, await load.gauges(url, "requests_open")

    with started(max_waiting=100) as live:
        begun, seconds, still_open = asyncio.run(leave(live.url, live.model))
    tell("clients that leave", begun=begun, seconds_until_free=round(seconds, 2))
    assert begun >= 450  # some answers are over before their first words are read
    assert seconds < 2
    assert still_open == 1  # the one that asks for the metrics


def test_500_clients_read_slowly(started: Start) -> None:
    """Others are answered meanwhile, and all places are free behind them (G17)."""

    async def measured(live: Live) -> tuple[Counter[str], list[load.Seen], float]:
        slow = asyncio.ensure_future(
            load.read_slowly(live.url, live.model, n_clients=500, at_once=40, seconds=4)
        )
        others = await load.closed_loop(
            live.url, live.model, 2, lambda: not slow.done(), max_tokens=20
        )
        count, start = await slow, time.perf_counter()
        while await load.gauges(live.url, "running", "waiting") and time.perf_counter() < start + 9:
            await asyncio.sleep(0.02)
        return count, others, time.perf_counter() - start

    with started(max_waiting=100) as live:
        count, others, seconds = asyncio.run(measured(live))
    tell(
        "slow readers", **count, others=dict(load.ledger(others)),
        others_p99_s=round(p99(others), 2), seconds_until_free=round(seconds, 2),
    )  # fmt: skip
    assert count["begun"] == 500
    assert set(load.ledger(others)) == {"whole"}
    assert seconds < 2


async def under_load(live: Live, work: Callable[[Live], Awaitable[None]]) -> list[load.Seen]:
    """Do something while six clients ask; return what they saw."""
    going_on = True
    clients = asyncio.ensure_future(
        load.closed_loop(live.url, live.model, 6, lambda: going_on, max_tokens=60)
    )
    try:
        await work(live)
    finally:
        going_on = False
        seen = await clients
    return seen


@pytest.mark.parametrize("part", ["ProxyActor", "ServeController"])
def test_what_stands_around_replicas_is_killed(started: Start, part: str) -> None:
    """Accepted = answered + told or seen cut off; all is well within 30 s (G16)."""
    draw, recoveries = random.Random(7), list[float]()

    async def strike(live: Live) -> None:
        for _ in range(5):
            await asyncio.sleep(draw.uniform(1.0, 4.0))
            before = load.serving(live.process.pid, f"ray::{part}".encode())
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            start = time.perf_counter()
            assert before and await load.until(
                lambda before=before: bool(  # type: ignore[misc]
                    set(load.serving(live.process.pid, f"ray::{part}".encode())) - set(before)
                ), 60,
            )  # fmt: skip
            assert await load.whole_again(live.url, live.model, 60) is not None
            recoveries.append(time.perf_counter() - start)

    with started(min_replicas=2, threads=1) as live:
        seen = asyncio.run(under_load(live, strike))
    count = load.ledger(seen)
    tell(f"5 kills of {part}", requests=len(seen), **count, back_in_s=round(max(recoveries), 1))
    assert count["silently cut"] == 0
    assert part == "ProxyActor" or count["cut off"] == 0  # who closes connections dies with them
    assert count["whole"] > 0
    assert max(recoveries) <= 30


def test_30_replicas_are_killed_under_load(started: Start) -> None:
    """Accepted = answered + told; nothing is silently cut (G16)."""
    draw, recoveries = random.Random(7), []

    async def strike(live: Live) -> None:
        for _ in range(30):
            await asyncio.sleep(draw.uniform(0.5, 4.0))
            os.kill(draw.choice(load.replicas(live.process.pid)), signal.SIGKILL)
            full = await load.until(lambda: len(load.replicas(live.process.pid)) == 2, 60)
            recoveries.append(full)
            await asyncio.to_thread(wait_ready, live)

    def wait_ready(live: Live) -> None:
        until = time.monotonic() + 60
        while sent(live.url, Made("GET", "/readyz")).status != 200 and time.monotonic() < until:
            time.sleep(0.1)

    with started(min_replicas=2, threads=1) as live:
        seen = asyncio.run(under_load(live, strike))
        again = asyncio.run(load.whole_again(live.url, live.model, 60))
    count = load.ledger(seen)
    assert None not in recoveries
    tell(
        "30 kills",
        requests=len(seen),
        **count,
        slowest_new_process_s=round(max(one for one in recoveries if one is not None), 1),
    )
    assert count["silently cut"] == count["cut off"] == 0
    assert count["whole"] > 0
    assert again is not None


def test_a_cluster_is_deployed_to_and_rolled_five_times(tiny_model: Path) -> None:
    """`serve deploy` as documented: two replicas, five redeploys under load, no key in any file."""
    key = "canary-key-of-the-soak"
    headers = {"Authorization": f"Bearer {key}"}
    model = tiny_model.name

    async def rolled(place: Cluster) -> list[load.Seen]:
        going_on = True
        clients = asyncio.ensure_future(
            load.closed_loop(place.url, model, 4, lambda: going_on, headers, max_tokens=60)
        )
        for number in range(1, 6):
            await asyncio.to_thread(
                place.deploy, path=str(tiny_model), min_replicas=2, max_replicas=3,
                max_waiting=16 + number, threads=1,
            )  # fmt: skip
        going_on = False
        return await clients

    # a short path: Ray's sockets are in it, and their names have a bound
    with (
        tempfile.TemporaryDirectory(prefix="soak") as folder,
        cluster(Path(folder), RAYTUNE_API_KEY=key) as place,
    ):
        place.deploy(path=str(tiny_model), min_replicas=2, max_replicas=3, threads=1)
        metrics = httpx.get(f"{place.url}/metrics", headers=headers).text
        bare = httpx.get(f"{place.url}/metrics").status_code
        seen = asyncio.run(rolled(place))
        written = [
            file
            for file in (Path(folder) / "ray").rglob("*")
            if file.is_file() and not file.is_symlink() and key.encode() in file.read_bytes()
        ]
    count = load.ledger(seen)
    names = set(re.findall(r'raytune_ready\{replica="([^"]+)"', metrics))
    tell("5 redeploys", requests=len(seen), **count, files_with_the_key=len(written))
    assert bare == 401
    assert len(names) == 2
    assert set(count) <= {"whole", "refused", "error"}
    assert count["whole"] > 0
    assert written == []


def test_overload_keeps_goodput(started: Start) -> None:
    """The excess is refused at once, what is accepted is answered, and all is well behind it (G17).

    Places are full from 1x on. Each level stands between two stretches of 1x, since what a busy
    machine can do drifts by more than a tenth within minutes.
    """

    async def stretch(live: Live, times: int, per_second: float) -> tuple[float, list[load.Seen]]:
        """Return the tokens a second from the fifth second on, and all that was seen."""
        start = time.perf_counter()
        seen = (
            await load.open_loop(live.url, live.model, times * per_second, LEVEL_S, max_tokens=200)
            if times > 1
            else await load.closed_loop(
                live.url, live.model, PLACES, lambda: time.perf_counter() < start + LEVEL_S,
                max_tokens=200,
            )
        )  # fmt: skip
        return load.goodput(seen, start + 5, LEVEL_S - 5), seen

    async def measured(live: Live) -> list[tuple[int, float, list[load.Seen]]]:
        found = [(1, *await stretch(live, 1, 0.0))]
        answers = load.ledger(found[0][2])["whole"] / LEVEL_S
        for times in (2, 4, 10):
            found.append((times, *await stretch(live, times, answers)))
            found.append((1, *await stretch(live, 1, 0.0)))
        return found

    with started(slots=PLACES // 2, max_waiting=PLACES // 2) as live:
        found = asyncio.run(measured(live))
    lows = {}
    for before, (times, goodput, seen), behind in zip(
        found[::2], found[1::2], found[2::2], strict=False
    ):
        full = (before[1] + behind[1]) / 2
        refused = sorted(one.seconds for one in seen if one.outcome == "refused")
        count, slowest = load.ledger(seen), p99(seen) / p99([*before[2], *behind[2]])
        lows[times] = goodput / full
        tell(
            f"overload {times}x", tokens_per_s=f"{goodput:.0f}",
            at_1x=f"{before[1]:.0f} and {behind[1]:.0f}", goodput=f"{lows[times]:.0%}", **count,
            accepted_p99_over_1x=round(slowest, 2),
            refused_in_ms_p50=round(1e3 * refused[len(refused) // 2], 1),
            refused_in_ms_p99=round(1e3 * refused[len(refused) * 99 // 100], 1),
        )  # fmt: skip
        assert set(count) == {"whole", "refused"}
        assert {one.status for one in seen if one.outcome == "refused"} == {429}
        assert all(one.retry_after for one in seen if one.outcome == "refused")
        assert slowest <= 2
        begun = min(one.ended - one.seconds for one in behind[2])
        soon = [one for one in behind[2] if one.outcome == "whole" and one.ended < begun + 10]
        assert len(soon) > PLACES, "who comes behind it is answered within 10 s"
    assert min(lows.values()) >= 0.9, lows


def p99(seen: list[load.Seen]) -> float:
    """Return the seconds in which 99% of the whole answers were there."""
    took = sorted(one.seconds for one in seen if one.outcome == "whole")
    return took[len(took) * 99 // 100]


def test_ids_of_1000_chats_with_every_template(endless: ChatModel) -> None:
    """The server's ids are training's (G7)."""
    compared, found = asyncio.run(differences(endless, n_chats=1000, seed=1))
    tell("ids", chats=compared, differences=len(found))
    assert found == []
