"""Many clients at once: each request is accounted for, by what its client has seen.

`Outcome` is the ledger: an answer is whole, refused (429, 503 with words), ended by an error that
the client was told, cut off by a closed connection, or silently cut, which must never be.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

Outcome = Literal["whole", "refused", "error", "cut off", "silently cut"]
BROKEN = (httpx.TransportError, httpx.StreamError)


@dataclass(frozen=True)
class Seen:
    """What came of one request, and how long it took in seconds."""

    outcome: Outcome
    status: int
    seconds: float
    retry_after: str | None = None
    ended: float = 0.0
    """When it was over, by time.perf_counter."""


def question(model: str, seed: int, **fields: Any) -> dict[str, Any]:
    """Make a request's body."""
    content = f"red river {seed}?"
    message = {"role": "user", "content": content}
    return {"model": model, "messages": [message], "seed": seed, "temperature": 1.5, **fields}


async def asked(client: httpx.AsyncClient, body: dict[str, Any]) -> Seen:
    """Send one request, whole or streamed, and judge its end."""
    start = time.perf_counter()
    outcome: Outcome
    status, wait = 0, None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            status, wait = response.status_code, response.headers.get("retry-after")
            if status == 200 and body.get("stream"):
                outcome = await _streamed([line async for line in response.aiter_lines()])
            else:
                outcome = _whole(status, await response.aread())
    except BROKEN:
        outcome = "cut off"
    ended = time.perf_counter()
    return Seen(outcome, status, ended - start, wait, ended)


def _whole(status: int, body: bytes) -> Outcome:
    answer = json.loads(body)
    if status == 200:
        return "whole" if answer["choices"][0]["finish_reason"] else "silently cut"
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return "refused" if status in (429, 503) else "error"


async def _streamed(lines: list[str]) -> Outcome:
    events = [line.removeprefix("data: ") for line in lines if line]
    if events and events[-1] == "[DONE]":
        ended = json.loads(events[-2])["choices"][0]["finish_reason"]
        return "whole" if ended else "silently cut"
    return "error" if events and '"error"' in events[-1] else "silently cut"


async def closed_loop(
    url: str,
    model: str,
    clients: int,
    going_on: Callable[[], bool],
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> list[Seen]:
    """Have so many clients ask again and again while `going_on`."""
    seen: list[Seen] = []

    async def one(number: int) -> None:
        draw = random.Random(number)
        async with _client(url, 1, headers) as client:
            while going_on():
                body = question(model, draw.randrange(10**6), stream=draw.random() < 0.5, **fields)
                seen.append(await asked(client, body))
                if seen[-1].outcome != "whole":
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


async def open_loop(
    url: str, model: str, per_second: float, seconds: float, **fields: Any
) -> list[Seen]:
    """Send requests at a rate, whatever becomes of them; half of them streams, as above."""
    tasks = []
    async with _client(url, None) as client:
        start = time.perf_counter()
        for number in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, start + number / per_second - time.perf_counter()))
            body = question(model, number, stream=number % 2 == 0, **fields)
            tasks.append(asyncio.ensure_future(asked(client, body)))
        return list(await asyncio.gather(*tasks))


async def leave_streams(url: str, model: str, n_clients: int, at_once: int) -> int:
    """Open streams and leave each behind its first words; return how many had begun."""
    room, begun = asyncio.Semaphore(at_once), 0

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal begun
        body = question(model, number, stream=True, max_tokens=400)
        async with room, client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 200:
                async for line in response.aiter_lines():
                    if '"content"' in line and '"content": ""' not in line:
                        begun += 1
                        break

    async with _client(url, None) as client:
        await asyncio.gather(*(one(client, number) for number in range(n_clients)))
    return begun


def _client(url: str, most: int | None, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers)


def goodput(seen: list[Seen], start: float, seconds: float) -> float:
    """Return whole answers a second over a stretch, without what begins and ends a measurement."""
    whole = [one for one in seen if one.outcome == "whole" and start < one.ended < start + seconds]
    return len(whole) / seconds


def ledger(seen: list[Seen]) -> Counter[str]:
    """Count outcomes."""
    return Counter(one.outcome for one in seen)


def replicas(root: int) -> list[int]:
    """Return the process ids of the replicas under a process, as /proc has them."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if command.startswith(b"ray::ServeReplica:") and b"ChatEndpoint" in command:
            found.append(int(folder.name))
    return [pid for pid in found if root in set(_line_of(pid, parents))]


def _line_of(pid: int, parents: dict[int, int]) -> list[int]:
    line = []
    while pid in parents:
        line.append(pid)
        pid = parents[pid]
    return line


async def until(condition: Callable[[], bool], seconds: float) -> float | None:
    """Return after how many seconds a condition holds, None if it does not in time."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        if condition():
            return time.perf_counter() - start
        await asyncio.sleep(0.05)
    return None


async def gauges(url: str, *names: str) -> float:
    """Return the sum of gauges of /metrics over all replicas, by names without their prefix."""
    async with _client(url, 1) as client:
        text = (await client.get("/metrics")).text
    starts = tuple(f"raytune_{name}{{" for name in names)
    return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(starts))


async def whole_again(url: str, model: str, seconds: float) -> float | None:
    """Return after how many seconds a request is answered, None if it is not in time."""
    start = time.perf_counter()
    async with _client(url, 1) as client:
        while time.perf_counter() - start < seconds:
            if (await asked(client, question(model, 1, max_tokens=2))).outcome == "whole":
                return time.perf_counter() - start
            await asyncio.sleep(0.1)
    return None


def resident_mib(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (one for one in status.splitlines() if one.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
