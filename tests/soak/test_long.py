"""Requests by the ten thousand, whose clients' books and the server's log must say the same (G15).

Arrivals are Poisson's, whoever is still being answered. Each request has an id of its own, under
which both sides tell its status, its tokens and why it ended. Each test prints a line, which
docs/reliability.md has. Run: pytest -m soak -s tests/soak/test_long.py -k 100_000, or
pytest -m "soak and gpu" -s tests/soak/test_long.py -k 20_000; for a rehearsal of either
--requests N, and of the latter --seconds S and --made SHAPE, which needs no GPU.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.made_model import WORDS, shape_of
from benchmarks.serve import made
from tests.serving.conftest import Live
from tests.soak import load
from tests.soak.conftest import Start
from tests.soak.load import tell

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(7200)]
MEASUREMENTS = 50
"""Of memory and file handles in a run."""
SETTLING = 5_000
"""Requests at first whose growth is not counted: allocators and bounded caches fill."""
LEAST_FIT = 10_000
"""Requests that a slope is judged over; a shorter rehearsal only prints it."""
MIB_PER_10_000, MORE_HANDLES = 1.0, 8
OTHER_ROUTES = frozenset({"/metrics"})
"""Whose lines in the log belong to no request of a client."""


@dataclass(frozen=True)
class Kind:
    """What requests are like."""

    words: int
    """Of a prompt, behind its number."""
    tokens: tuple[int, int]
    """Of an answer at most, from and to."""
    heat: float = 1.5
    """Temperature."""

    def requests(
        self, name: str, model: str, count: int, *, likeliest: int | None = None
    ) -> Iterator[load.Request]:
        """Draw requests with ids `name-0`, `name-1`, ...

        Half of them streams. A quarter lists its tokens with their log probabilities, the only
        way to count them but by what usage says; with `likeliest` all do, with so many beside each.
        """
        draw = random.Random(name)
        for number in range(count):
            listed = {"logprobs": True} if likeliest is not None or draw.random() < 0.25 else {}
            body = load.question(
                model,
                number,
                stream=draw.random() < 0.5,
                max_tokens=draw.randint(*self.tokens),
                temperature=self.heat,
                **listed,
                **({} if likeliest is None else {"top_logprobs": likeliest}),
            )
            words = [str(number), *draw.choices(WORDS, k=self.words)]
            body["messages"][0]["content"] = " ".join(words)
            yield f"{name}-{number}", body


@dataclass(frozen=True)
class Measured:
    """A replica behind so many requests of a run."""

    requests: int
    mib: float
    handles: int


@dataclass
class Books:
    """What the clients of one endpoint saw, by the ids that they sent."""

    replica: int
    every: int
    """Requests from one measurement to the next."""
    seen: dict[str, load.Seen] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of each answer of the run, without the pilot's."""
    measured: list[Measured] = field(default_factory=list)

    def note(self, name: str, one: load.Seen) -> None:
        """Take down what came of a request."""
        assert name not in self.seen, f"{name} was answered twice"
        self.seen[name] = one

    def take(self, name: str, one: load.Seen) -> None:
        """Take down what came of a request of the run, and measure the replica now and then."""
        self.note(name, one)
        self.seconds.append(one.seconds)
        count = len(self.seconds)
        if count == 1 or count % self.every == 0:
            mib, handles = load.resident_mib(self.replica), load.handles(self.replica)
            self.measured.append(Measured(count, mib, handles))

    @property
    def fitted(self) -> list[Measured]:
        """What a slope goes through: all behind the settling, or all there is of a rehearsal."""
        late = [one for one in self.measured if one.requests >= SETTLING]
        return late if len(late) > 1 else self.measured

    def slope(self) -> float:
        """Return the growth in MiB per 10,000 requests, by least squares."""
        x, y = [one.requests for one in self.fitted], [one.mib for one in self.fitted]
        return 1e4 * statistics.linear_regression(x, y).slope

    def more_handles(self) -> int:
        """Return how many more files are open at the end than at the beginning."""
        return self.measured[-1].handles - self.measured[0].handles


def differences(seen: dict[str, load.Seen], log: Path) -> Iterator[str]:
    """Yield a line for each thing that one side says and the other does not, joined by id."""
    left = set(seen)
    with log.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["route"] in OTHER_ROUTES:
                continue
            name = line["id"]
            if name not in seen:
                yield f"{name}: in the log, and no client sent it: {line}"
            elif name not in left:
                yield f"{name}: more than once in the log"
            elif said(line) != told(seen[name]):
                yield f"{name}: the log has {said(line)}, the client {told(seen[name])}"
            left.discard(name)
    yield from (f"{name}: not in the log" for name in left)
    others = (name for name, one in seen.items() if one.id != name)
    yield from (f"{name}: answered as {seen[name].id}" for name in others)


def said(line: dict[str, object]) -> tuple[object, ...]:
    """Return what the server says of a request: status, tokens, finish, and an error if any."""
    return line["status"], line.get("completion_tokens"), line.get("finish"), line.get("error")


def told(one: load.Seen) -> tuple[object, ...]:
    """Return what a client saw, in the same form."""
    return one.status, one.tokens, one.finish, None


async def settled(log: Path, lines: int) -> None:
    """Wait until a log has so many lines: a client may be told before the log is."""
    until = time.monotonic() + 10
    while log.read_bytes().count(b"\n") < lines and time.monotonic() < until:
        await asyncio.sleep(0.2)


async def warmed(live: Live, books: Books, kind: Kind, count: int, **how: int) -> float:
    """Ask with 16 clients in turn, or `clients`; return the answers a second of it."""
    clients, start = how.pop("clients", 16), time.perf_counter()
    requests = kind.requests("pilot", live.model, count, **how)
    await load.in_turn(live.url, requests, clients, books.note)
    return count / (time.perf_counter() - start)


async def soaked(live: Live, books: Books, kind: Kind, count: int, seconds: float) -> float:
    """Send so many requests in so many seconds; return the seconds until all were answered.

    Poisson arrivals of a known number are as many points drawn evenly over the time.
    """
    draw, start = random.Random(count), time.perf_counter()
    times = sorted(draw.uniform(0.0, seconds) for _ in range(count))
    await load.poisson(live.url, kind.requests("soak", live.model, count), times, books.take)
    return time.perf_counter() - start


def judge(name: str, books: Books, log: Path, sent: int, **figures: object) -> None:
    """Print the line of a run and check it; `sent` counts its pilot in."""
    asyncio.run(settled(log, sent))
    found, outcomes = list(differences(books.seen, log)), load.ledger([*books.seen.values()])
    took = statistics.quantiles(books.seconds, n=100)
    tell(
        name, **outcomes, lost=sent - len(books.seen), differences=len(found),
        finish=dict(Counter(one.finish for one in books.seen.values())),
        tokens=sum(one.tokens for one in books.seen.values()), **figures,
        p50_s=round(took[49], 2), p99_s=round(took[98], 2),
        mib=" ".join(f"{one.mib:.0f}" for one in books.measured[::5]),
        mib_per_10_000=round(books.slope(), 2), file_handles=f"{books.more_handles():+d}",
    )  # fmt: skip
    assert len(books.seen) == sent
    assert set(outcomes) == {"whole"}
    assert found == [], found[:10]
    assert books.more_handles() <= MORE_HANDLES
    if books.fitted[-1].requests - books.fitted[0].requests >= LEAST_FIT:
        assert books.slope() <= MIB_PER_10_000


def opened(live: Live, count: int) -> Books:
    """Return empty books of an endpoint with one replica."""
    (replica,) = load.replicas(live.process.pid)
    return Books(replica, max(1, count // MEASUREMENTS))


def test_100_000_requests(started: Start, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """At 70% of what 16 clients in turn are answered; about 40 minutes."""
    count = request.config.getoption("requests", None) or 100_000
    log, kind, piloted = tmp_path / "access.log", Kind(3, (1, 8)), max(500, count // 50)
    # a model of two layers is done before several threads have met
    with started(access_log=str(log), max_waiting=400, threads=1) as live:
        books = opened(live, count)
        rate = 0.7 * asyncio.run(warmed(live, books, kind, piloted))
        seconds = asyncio.run(soaked(live, books, kind, count, count / rate))
        assert load.replicas(live.process.pid) == [books.replica]
    judge("soak", books, log, count + piloted, per_s=round(rate, 1), seconds=round(seconds))


@pytest.mark.gpu
def test_20_000_requests_on_a_gpu(
    started: Start, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A model of 7B, random weights in bfloat16: 33.3 requests a second for ten minutes."""
    import torch

    option = request.config.getoption
    shape, given = option("made", None), option("seconds", None) or 600.0
    count = option("requests", None) or 20_000
    if shape is None and not torch.cuda.is_available():
        pytest.skip("no CUDA device; --made tiny --requests 300 --seconds 60 rehearses this")
    sizes = shape_of("135m", layers=2, shrink=8) if shape == "tiny" else shape_of(shape or "7b")
    # greedy: to random weights all words are alike, and a drawn one needs them all in order
    log, kind, piloted = tmp_path / "access.log", Kind(50, (16, 64), heat=0.0), min(512, count)

    with tempfile.TemporaryDirectory() as folder:  # pytest would keep 13.5 GB of each run
        model = Path(made(Path(folder) / (shape or "7b"), sizes))
        options = {"access_log": str(log), "engine": "embedded", "max_waiting": 400}
        with started(model, seconds=400.0, **options) as live:
            books = opened(live, count)
            # graphs are captured, and the bounded cache of tokens' spellings, which would take
            # a whole run to fill, by the 20 likeliest beside each token
            asyncio.run(warmed(live, books, kind, piloted, clients=128, likeliest=20))
            seconds = asyncio.run(soaked(live, books, kind, count, given))
            assert load.replicas(live.process.pid) == [books.replica]
    per_s = round(count / given, 1)
    judge("soak on a GPU", books, log, count + piloted, per_s=per_s, seconds=round(seconds))
    assert seconds <= given + 20
