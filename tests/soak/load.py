"""Many clients at once: each request is accounted for, by what its client has seen.

`Outcome` is the ledger: an answer is whole, refused (429, 503 with words), ended by an error that
the client was told, cut off by a closed connection, or silently cut, which must never be.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

Outcome = Literal["whole", "refused", "error", "cut off", "silently cut"]
BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Seen:
    """What came of one request, and how long it took in seconds."""

    outcome: Outcome
    status: int
    seconds: float
    retry_after: str | None = None
    ended: float = 0.0
    """When it was over, by time.perf_counter."""
    tokens: int = 0
    """Of the answer, as its usage says."""


def question(model: str, seed: int, **fields: Any) -> dict[str, Any]:
    """Make a request's body."""
    content = f"red river {seed}?"
    message = {"role": "user", "content": content}
    if fields.get("stream"):
        fields["stream_options"] = {"include_usage": True}
    return {"model": model, "messages": [message], "seed": seed, "temperature": 1.5, **fields}


async def asked(client: aiohttp.ClientSession, body: dict[str, Any]) -> Seen:
    """Send one request, whole or streamed, and judge its end."""
    start = time.perf_counter()
    outcome: Outcome
    status, wait, tokens = 0, None, 0
    try:
        async with client.post("/v1/chat/completions", json=body) as response:
            status, wait = response.status, response.headers.get("retry-after")
            answer = await response.read()
            streamed = status == 200 and body.get("stream")
            outcome, tokens = _streamed(answer) if streamed else _whole(status, answer)
    except BROKEN:
        outcome = "cut off"
    ended = time.perf_counter()
    return Seen(outcome, status, ended - start, wait, ended, tokens)


def _whole(status: int, body: bytes) -> tuple[Outcome, int]:
    answer = json.loads(body)
    if status == 200:
        ended = answer["choices"][0]["finish_reason"]
        return "whole" if ended else "silently cut", answer["usage"]["completion_tokens"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return "refused" if status in (429, 503) else "error", 0


def _streamed(answer: bytes) -> tuple[Outcome, int]:
    events = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line]
    if events and events[-1] == "[DONE]":
        last, usage = (json.loads(event) for event in events[-3:-1])
        ended = last["choices"][0]["finish_reason"]
        return "whole" if ended else "silently cut", usage["usage"]["completion_tokens"]
    return "error" if events and '"error"' in events[-1] else "silently cut", 0


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

    async def one(client: aiohttp.ClientSession, number: int) -> None:
        nonlocal begun
        body = question(model, number, stream=True, max_tokens=400)
        async with room, client.post("/v1/chat/completions", json=body) as response:
            if response.status == 200:
                async for line in response.content:
                    if b'"content"' in line and b'"content": ""' not in line:
                        begun += 1
                        break
            response.close()  # not kept for another request

    async with _client(url, None) as client:
        await asyncio.gather(*(one(client, number) for number in range(n_clients)))
    return begun


async def read_slowly(
    url: str, model: str, n_clients: int, at_once: int, seconds: float
) -> Counter[str]:
    """Open streams, read a few bytes of each now and then, and leave; count what was begun.

    The sockets' buffers are small, so that what is not read waits in the server.
    """
    room, count = asyncio.Semaphore(at_once), Counter[str]()

    def small(info: Any) -> socket.socket:
        made = socket.socket(*info[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return made

    async def one(client: aiohttp.ClientSession, number: int) -> None:
        body = question(model, number, stream=True, max_tokens=400)
        async with room, client.post("/v1/chat/completions", json=body) as response:
            count["begun" if response.status == 200 else "refused"] += 1
            until = time.perf_counter() + seconds
            while response.status == 200 and time.perf_counter() < until:
                if not await response.content.read(64):
                    count["read to its end"] += 1
                    break
                await asyncio.sleep(0.2)
            response.close()

    connector = aiohttp.TCPConnector(limit=0, socket_factory=small, force_close=True)
    patient = aiohttp.ClientTimeout(total=None, sock_read=120)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=patient, read_bufsize=1024
    ) as client:
        await asyncio.gather(*(one(client, number) for number in range(n_clients)))
    return count


def _client(
    url: str, most: int | None, headers: dict[str, str] | None = None
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=120, sock_read=120),
        connector=aiohttp.TCPConnector(limit=most or 0, keepalive_timeout=4),
    )


def goodput(seen: list[Seen], start: float, seconds: float) -> float:
    """Return the tokens a second of answers that came whole within a stretch.

    Without what begins and ends a measurement; a few hundred answers of any length tell a rate of
    answers to a tenth only.
    """
    whole = (one for one in seen if one.outcome == "whole" and start < one.ended < start + seconds)
    return sum(one.tokens for one in whole) / seconds


def ledger(seen: list[Seen]) -> Counter[str]:
    """Count outcomes."""
    return Counter(one.outcome for one in seen)


def replicas(root: int) -> list[int]:
    """Return the process ids of the replicas under a process, as /proc has them."""
    return serving(root, b"ray::ServeReplica:", b"ChatEndpoint")


def serving(root: int, begins: bytes, holds: bytes = b"") -> list[int]:
    """Return the ids of processes under another one, by what their title begins with and holds."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if command.startswith(begins) and holds in command:
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
    async with _client(url, 1) as client, client.get("/metrics") as response:
        text = await response.text()
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
