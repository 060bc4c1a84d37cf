"""The long proofs of the endpoint, through Ray Serve: `make soak`, about an hour on two cores.

Each prints one line with its figures, which docs/serving.md has.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from raytune_ft.chat import ChatModel
from tests.serving.conftest import Live, start_endpoint, stop_endpoint
from tests.soak import load
from tests.soak.cluster import Cluster, cluster
from tests.soak.fuzz import fuzz
from tests.soak.ids import differences
from tests.soak.wire import Made, sent

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(7200)]
Start = Callable[..., AbstractContextManager[Live]]


@pytest.fixture
def started(tiny_model: Path, tmp_path: Path) -> Start:
    """Return what runs an endpoint of its own, for a test that is hard on it."""

    @contextmanager
    def run(**options: Any) -> Iterator[Live]:
        live = start_endpoint(
            tiny_model, tmp_path / "serve.log", {"access_log": "/dev/null", **options}
        )
        try:
            yield live
        finally:
            stop_endpoint(live)

    return run


def tell(name: str, **figures: Any) -> None:
    """Print a line of the table."""
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


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


def test_30_replicas_are_killed_under_load(started: Start) -> None:
    """Accepted = answered + told; nothing is silently cut (G16)."""
    draw, recoveries = random.Random(7), []

    async def strike(live: Live) -> list[load.Seen]:
        going_on = True
        clients = asyncio.ensure_future(
            load.closed_loop(live.url, live.model, 6, lambda: going_on, max_tokens=60)
        )
        for _ in range(30):
            await asyncio.sleep(draw.uniform(0.5, 4.0))
            os.kill(draw.choice(load.replicas(live.process.pid)), signal.SIGKILL)
            full = await load.until(lambda: len(load.replicas(live.process.pid)) == 2, 60)
            recoveries.append(full)
            await asyncio.to_thread(wait_ready, live)
        going_on = False
        return await clients

    def wait_ready(live: Live) -> None:
        until = time.monotonic() + 60
        while sent(live.url, Made("GET", "/readyz")).status != 200 and time.monotonic() < until:
            time.sleep(0.1)

    with started(min_replicas=2, threads=1) as live:
        seen = asyncio.run(strike(live))
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


@pytest.mark.parametrize("times", [2, 4, 10])
def test_overload_keeps_goodput(started: Start, times: int) -> None:
    """The excess is refused at once, and what is accepted is answered (G17)."""

    async def measured(live: Live) -> tuple[float, float, list[load.Seen]]:
        """Measure both between their fifth second and their end, where places are full."""
        start = time.perf_counter()
        full = await load.closed_loop(
            live.url, live.model, 8, lambda: time.perf_counter() < start + 25, max_tokens=200
        )
        capacity = load.goodput(full, start + 5, 20)
        start = time.perf_counter()
        seen = await load.open_loop(live.url, live.model, times * capacity, 45, max_tokens=200)
        return capacity, load.goodput(seen, start + 5, 40), seen

    with started(slots=4, max_waiting=4) as live:
        capacity, goodput, seen = asyncio.run(measured(live))
    refused = sorted(one.seconds for one in seen if one.outcome == "refused")
    count = load.ledger(seen)
    tell(
        f"overload {times}x",
        capacity_per_s=round(capacity, 1),
        goodput=f"{goodput / capacity:.0%}",
        **count,
        refused_in_ms_p50=round(1e3 * refused[len(refused) // 2]),
    )
    assert set(count) == {"whole", "refused"}
    assert {one.status for one in seen if one.outcome == "refused"} == {429}
    assert all(one.retry_after for one in seen if one.outcome == "refused")
    assert goodput >= 0.9 * capacity


def test_100_000_requests(started: Start) -> None:
    """Nothing is lost, memory and file handles stay (G15)."""

    async def long(live: Live, n_requests: int) -> Counter[str]:
        left = iter(range(n_requests))
        seen = await load.closed_loop(
            live.url, live.model, 16, lambda: next(left, None) is not None, max_tokens=3
        )
        return load.ledger(seen)

    def handles(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    with started() as live:
        (replica,) = load.replicas(live.process.pid)
        asyncio.run(long(live, 5_000))
        before, files = load.resident_mib(replica), handles(replica)
        count = asyncio.run(long(live, 95_000))
        growth, more = load.resident_mib(replica) - before, handles(replica) - files
    tell("soak", **count, mib_per_10_000=round(growth / 9.5, 2), file_handles=f"{more:+d}")
    assert set(count) == {"whole"}
    assert sum(count.values()) == 95_000
    assert growth / 9.5 <= 1
    assert more <= 8


def test_ids_of_1000_chats_with_every_template(endless: ChatModel) -> None:
    """The server's ids are training's (G7)."""
    compared, found = asyncio.run(differences(endless, n_chats=1000, seed=1))
    tell("ids", chats=compared, differences=len(found))
    assert found == []
