"""Load on something that answers: when requests come, what each one saw, and what that makes.

Arrivals are open-loop: a request comes when its time has come, whoever is still being answered.
Gaps between them are exponential (Poisson arrivals) with a fixed seed, the same for every side.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.made_model import WORDS

Ask = Callable[[str, int], AsyncIterator[tuple[str, int]]]
"""A user's message and tokens at most in; out the answer's text in parts, each with the tokens
so far where they are told, else 0."""


@dataclass
class Seen:
    """What one request saw; seconds since the load began."""

    start: float
    times: list[float] = field(default_factory=list)
    """Of each part of the answer that had text."""
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Load:
    """Requests and when they come."""

    messages: Sequence[str]
    gaps: Sequence[float]
    """Seconds between one request and the next."""
    tokens: int
    """Of an answer at most."""


def load_of(requests: int, per_second: float, words: int, tokens: int, seed: int = 0) -> Load:
    """Draw requests: messages of so many words, of which no two begin alike."""
    drawn = random.Random(seed)
    messages = [
        f"{seed}-{n} " + " ".join(drawn.choice(WORDS) for _ in range(words))
        for n in range(requests)
    ]
    gaps = [drawn.expovariate(per_second) for _ in range(requests)]
    return Load(messages, gaps, tokens)


async def run(ask: Ask, load: Load) -> list[Seen]:
    """Send all requests at their times and wait for all answers."""
    began = time.perf_counter()
    tasks, due = [], 0.0
    for message, gap in zip(load.messages, load.gaps, strict=True):
        tasks.append(asyncio.create_task(_one(ask, message, load.tokens, began)))
        due += gap
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
    return await asyncio.gather(*tasks)


async def _one(ask: Ask, message: str, tokens: int, began: float) -> Seen:
    seen = Seen(time.perf_counter() - began)
    try:
        async for text, so_far in ask(message, tokens):
            seen.tokens = max(seen.tokens, so_far)
            if text:
                seen.times.append(time.perf_counter() - began)
    except Exception as error:  # a side that fails is a result
        seen.error = f"{type(error).__name__}: {error}"[:200]
    return seen


def summary(seen: Sequence[Seen]) -> dict[str, float | int]:
    """Return tokens per second, time to first token and between tokens (ms), and failures."""
    good = [one for one in seen if one.times and one.tokens and not one.error]
    if not good:
        return {"requests": len(seen), "failed": len(seen)}
    took = max(one.times[-1] for one in good) - min(one.start for one in good)
    tokens = sum(one.tokens for one in good)
    to_first = [one.times[0] - one.start for one in good]
    # a part may hold several tokens
    between = [(o.times[-1] - o.times[0]) / (o.tokens - 1) for o in good if o.tokens > 1]
    stalls = [after - before for one in good for before, after in pairwise(one.times)]
    return {
        "requests": len(seen),
        "failed": len(seen) - len(good),
        "tokens": tokens,
        "tokens_per_s": round(tokens / took, 1),
        "ttft_p50_ms": _ms(to_first, 0.5),
        "ttft_p99_ms": _ms(to_first, 0.99),
        "between_p50_ms": _ms(between, 0.5),
        "between_p99_ms": _ms(between, 0.99),
        "stall_p99_ms": _ms(stalls, 0.99),
        "latency_mean_s": round(statistics.fmean(o.times[-1] - o.start for o in good), 3),
    }


def _ms(values: Sequence[float], share: float) -> float:
    if not values:
        return 0.0
    ordered = sorted(values)
    return round(1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1)
