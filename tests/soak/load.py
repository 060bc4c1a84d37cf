"""Many clients at once: each request is accounted for, by what its client has seen.

`Outcome` is the ledger: an answer is whole, refused (429, 503 with words), ended by an error that
the client was told, cut off by a closed connection, or silently cut, which must never be: it says
that it is whole, and lacks its end, or its tokens do not add up.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import aiohttp

Outcome = Literal["whole", "refused", "error", "cut off", "silently cut"]
BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError)
Request = tuple[str, dict[str, Any]]
"""A client's own id, and a body."""


@dataclass(frozen=True, slots=True)
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
    finish: str | None = None
    id: str | None = None
    """The answer's X-Request-Id."""


class _Told(NamedTuple):
    """What an answer's bytes say."""

    outcome: Outcome
    finish: str | None = None
    tokens: int = 0


def question(model: str, seed: int, **fields: Any) -> dict[str, Any]:
    """Make a request's body."""
    content = f"red river {seed}?"
    message = {"role": "user", "content": content}
    if fields.get("stream"):
        fields["stream_options"] = {"include_usage": True}
    return {"model": model, "messages": [message], "seed": seed, "temperature": 1.5, **fields}


async def asked(
    client: aiohttp.ClientSession, body: dict[str, Any], name: str | None = None
) -> Seen:
    """Send one request, whole or streamed, under an id if there is one, and judge its end."""
    start = time.perf_counter()
    told, status, wait, answered = _Told("cut off"), 0, None, None
    try:
        async with client.post(
            "/v1/chat/completions", json=body, headers={"X-Request-Id": name} if name else None
        ) as response:
            status, wait = response.status, response.headers.get("retry-after")
            answered = response.headers.get("x-request-id")
            answer = await response.read()
            streamed = status == 200 and body.get("stream")
            told = _streamed(answer, body) if streamed else _whole(status, answer, body)
    except BROKEN:
        pass
    ended = time.perf_counter()
    return Seen(
        told.outcome, status, ended - start, wait, ended, told.tokens, told.finish, answered
    )


def _whole(status: int, content: bytes, body: dict[str, Any]) -> _Told:
    answer = json.loads(content)
    if status == 200:
        (choice,) = answer["choices"]
        return _judged(choice["finish_reason"], answer["usage"], [choice], body)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return _Told("refused" if status in (429, 503) else "error")


def _streamed(content: bytes, body: dict[str, Any]) -> _Told:
    events = [line.removeprefix(b"data: ") for line in content.split(b"\n") if line]
    if events and events[-1] == b"[DONE]":
        last, usage = (json.loads(event) for event in events[-3:-1])
        read = map(json.loads, events[:-2] if body.get("logprobs") else ())
        choices = [choice for event in read for choice in event["choices"]]
        return _judged(last["choices"][0]["finish_reason"], usage["usage"], choices, body)
    return _Told("error" if events and b'"error"' in events[-1] else "silently cut")


def _judged(
    finish: str | None, usage: dict[str, int], choices: list[dict[str, Any]], body: dict[str, Any]
) -> _Told:
    """Judge an answer that came to its end by its reason to end and by its counts of tokens."""
    tokens, most = usage["completion_tokens"], body.get("max_tokens")
    adds_up = most is None or (tokens == most if finish == "length" else tokens <= most)
    if body.get("logprobs"):
        told = (choice["logprobs"] for choice in choices if choice["logprobs"])
        adds_up = adds_up and sum(len(one["content"]) for one in told) == tokens
    return _Told("whole" if finish and adds_up else "silently cut", finish, tokens)


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


async def in_turn(
    url: str, requests: Iterable[Request], clients: int, took: Callable[[str, Seen], None]
) -> None:
    """Have so many clients take one request after the other; `took` hears what came of each."""
    left = iter(requests)

    async def one() -> None:
        async with _client(url, 1) as client:
            for name, body in left:
                took(name, await asked(client, body, name))

    await asyncio.gather(*(one() for _ in range(clients)))


async def poisson(
    url: str, requests: Iterable[Request], times: Iterable[float], took: Callable[[str, Seen], None]
) -> None:
    """Send each request at its time (s), whoever is still waiting; `took` hears of each."""
    waiting = set[asyncio.Task[None]]()

    async def one(client: aiohttp.ClientSession, name: str, body: dict[str, Any]) -> None:
        took(name, await asked(client, body, name))

    async with _client(url, None) as client:
        start = time.perf_counter()
        for (name, body), due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            task = asyncio.ensure_future(one(client, name, body))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)


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


def handles(pid: int) -> int:
    """Return how many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def tell(name: str, **figures: Any) -> None:
    """Print a line of the table."""
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
