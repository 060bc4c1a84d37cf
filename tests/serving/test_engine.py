"""The embedded engine: order, bound, cancelling, errors, end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from raytune_ft.chat import ChatModel, Piece, Sampling
from raytune_ft.errors import ServeError
from raytune_ft.serving.engine import EmbeddedEngine, EngineBusyError

SHORT = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=6, seed=1)
LONG = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=450, seed=1)
PROMPT = [5, 6, 7]


async def collect(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]


async def until_free(engine: EmbeddedEngine, in_use: int = 0) -> None:
    for _ in range(200):
        if engine.in_use <= in_use:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{engine.in_use} places are still in use after 2 s")


def test_concurrent_answers_equal_single_ones(engine: EmbeddedEngine, endless: ChatModel) -> None:
    async def three() -> list[list[Piece]]:
        seeds = [Sampling(1.0, 1.0, 0, 8, seed=s) for s in (1, 2, 1)]
        return await asyncio.gather(*[collect(engine.submit(PROMPT, s)) for s in seeds])

    first, second, third = asyncio.run(three())
    assert first == third == list(endless.pieces(PROMPT, Sampling(1.0, 1.0, 0, 8, seed=1)))
    assert first != second
    assert first[-1].finish == "length"


class Forever(ChatModel):
    """Talks until it is cancelled, so that a place comes free by cancelling or never."""

    def pieces(self, prompt_ids: Any, sampling: Any, cancelled: Any = None) -> Iterator[Piece]:
        for n_tokens in count(1):
            if cancelled():
                return
            time.sleep(0.002)
            yield Piece("x", n_tokens)


@pytest.fixture
def busy(endless: ChatModel) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(Forever(**vars(endless)), max_waiting=2)
    yield engine
    engine.close()


def test_more_than_may_wait_are_refused_at_once(busy: EmbeddedEngine) -> None:
    async def overload() -> None:
        taken = [busy.submit(PROMPT, LONG) for _ in range(3)]
        with pytest.raises(EngineBusyError, match="2 requests wait already"):
            busy.submit(PROMPT, SHORT)
        for left, pieces in enumerate(taken, start=1):  # none was ever read
            await pieces.aclose()
            await until_free(busy, in_use=3 - left)
        assert (await anext(busy.submit(PROMPT, SHORT))).text == "x"

    asyncio.run(overload())


def test_a_reader_that_leaves_frees_its_place(busy: EmbeddedEngine) -> None:
    async def leave() -> None:
        running, waiting = busy.submit(PROMPT, LONG), busy.submit(PROMPT, LONG)
        await anext(running)
        queued = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0.05)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        del waiting, queued
        await until_free(busy, in_use=1)
        await running.aclose()
        await until_free(busy)

    asyncio.run(leave())


class Broken(ChatModel):
    """Fails on prompts that begin with 1."""

    def pieces(self, prompt_ids: Any, *args: Any, **options: Any) -> Iterator[Piece]:
        if prompt_ids[0] == 1:
            raise MemoryError("no memory left")
        return super().pieces(prompt_ids, *args, **options)


def test_an_error_reaches_its_request_and_no_other(endless: ChatModel) -> None:
    engine = EmbeddedEngine(Broken(**vars(endless)))

    async def both() -> list[Any]:
        return await asyncio.gather(
            collect(engine.submit([1], SHORT)),
            collect(engine.submit(PROMPT, SHORT)),
            return_exceptions=True,
        )

    failed, answered = asyncio.run(both())
    engine.close()
    assert isinstance(failed, MemoryError)
    assert answered[-1].finish in ("stop", "length")


def test_closing_ends_running_and_waiting_answers(endless: ChatModel) -> None:
    engine = EmbeddedEngine(endless)

    async def shut() -> None:
        running, waiting = engine.submit(PROMPT, LONG), engine.submit(PROMPT, LONG)
        await anext(running)
        await asyncio.to_thread(engine.close)
        for pieces in (running, waiting):
            with pytest.raises(ServeError, match="shutting down"):
                await collect(pieces)
        with pytest.raises(ServeError, match="shutting down"):
            engine.submit(PROMPT, SHORT)

    asyncio.run(shut())
    assert not engine.healthy()
