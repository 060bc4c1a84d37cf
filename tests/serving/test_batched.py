"""Continuous batching: answers side by side are those alone; places, memory, prefixes, ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.chat import ChatModel, Piece, Sampling
from raytune_ft.errors import RecipeError, ServeError
from raytune_ft.model import lanes
from raytune_ft.model.lanes import NotBatchedError
from raytune_ft.serving.engine import EmbeddedEngine, EngineBusyError
from raytune_ft.serving.engines import EngineOptions, embedded
from raytune_ft.serving.engines.batched import FAILURES, BatchedEngine

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
LONG = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=450, seed=1)
TIE = 1e-5
"""Of the largest logit: two tokens that close may change places with the order of a sum."""


async def collect(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]


async def until(true: Callable[[], bool], what: str, seconds: float = 2.0) -> None:
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{what} after {seconds} s")


def told(pieces: Sequence[Piece]) -> list[tuple[str, int, str | None]]:
    return [(piece.text, piece.n_tokens, piece.finish) for piece in pieces]


@pytest.fixture
def many(endless: ChatModel) -> Iterator[BatchedEngine]:
    engine = BatchedEngine(endless, max_waiting=400, slots=32)
    yield engine
    engine.close()


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    drawn = random.Random(seed)
    return [
        [drawn.randrange(2, 250) for _ in range(drawn.randint(1, longest))] for _ in range(count)
    ]


def answered(
    engine: BatchedEngine, asked: Sequence[tuple[list[int], Sampling]]
) -> list[list[Piece]]:
    async def all_at_once() -> list[list[Piece]]:
        return await asyncio.gather(*[collect(engine.submit(ids, how)) for ids, how in asked])

    return asyncio.run(all_at_once())


def test_greedy_answers_of_200_prompts_are_those_of_one_at_a_time(
    many: BatchedEngine, endless: ChatModel
) -> None:
    """In float32; where they part, the two tokens are a tie within float32's rounding."""
    asked = [(ids, GREEDY) for ids in prompts(200)]
    found = answered(many, asked)
    parted = 0
    for (ids, how), pieces in zip(asked, found, strict=True):
        alone = list(endless.pieces(ids, how))
        if told(alone) != told(pieces):
            parted += 1
            assert closest(endless, ids, len(alone)) < TIE
    assert parted <= 2
    assert all(pieces[-1].finish == "length" for pieces in found)


def closest(chat: ChatModel, ids: list[int], n: int) -> float:
    """Return how close the two likeliest tokens of a greedy answer come, by the largest logit."""
    gaps, known = [], list(ids)
    with torch.no_grad():
        for _ in range(n):
            logits = chat.model(input_ids=torch.tensor([known])).logits[0, -1]
            (first, second), (best, _) = logits.topk(2)
            gaps.append(float((first - second) / logits.abs().max()))
            known.append(int(best))
    return min(gaps)


def test_a_seeds_answer_does_not_depend_on_who_else_is_answered(
    many: BatchedEngine, endless: ChatModel
) -> None:
    rules = [
        Sampling(1.0, 1.0, 0, 10, seed=3),
        Sampling(0.7, 0.9, 0, 10, seed=4),
        Sampling(1.3, 0.95, 40, 10, seed=5),
        Sampling(1.0, 1.0, 5, 10, seed=6, frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(0.0, 1.0, 0, 10, frequency_penalty=2.0),
        Sampling(1.0, 1.0, 0, 10, seed=3, logprobs=3),
    ]
    asked = [(ids, rule) for ids in prompts(4, seed=1) for rule in rules]
    found = answered(many, asked)
    for (ids, rule), pieces in zip(asked, found, strict=True):
        assert told(pieces) == told(list(endless.pieces(ids, rule)))
    texts = ["".join(piece.text for piece in pieces) for pieces in found]
    assert len(set(texts[:5])) > 3
    assert texts[0] == texts[5]


def test_penalties_keep_tokens_from_coming_again(many: BatchedEngine) -> None:
    plain, punished = answered(
        many,
        [
            ([7, 8, 9], Sampling(0.0, max_new_tokens=40, logprobs=0)),
            ([7, 8, 9], Sampling(0.0, max_new_tokens=40, logprobs=0, presence_penalty=2.0)),
        ],
    )
    kinds = [{c.bytes for p in pieces for c in p.chances} for pieces in (plain, punished)]
    assert len(kinds[1]) > len(kinds[0])


def test_chances_are_those_of_the_models_own_distribution(
    many: BatchedEngine, endless: ChatModel
) -> None:
    ids, how = [5, 6, 7], Sampling(1.7, 0.9, 30, 8, seed=2, logprobs=4, presence_penalty=1.0)
    (pieces,) = answered(many, [(ids, how)])
    chances = [chance for piece in pieces for chance in piece.chances]
    assert len(chances) == pieces[-1].n_tokens == 8
    with torch.no_grad():
        first = endless.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    values, words = first.topk(4)
    assert [top[2] for top in chances[0].top] == pytest.approx(values.tolist(), abs=1e-4)
    assert [top[0] for top in chances[0].top] == [
        endless.tokenizer.decode([word], skip_special_tokens=False) for word in words.tolist()
    ]
    drawn = b"".join(chance.bytes for chance in chances).decode("utf-8", "replace")
    assert drawn.startswith("".join(piece.text for piece in pieces).rstrip("\ufffd"))


def test_a_stop_string_ends_an_answer_and_frees_its_place(many: BatchedEngine) -> None:
    ids, how = [5, 6, 7], Sampling(2.0, 1.0, 0, 60, seed=5)
    (whole,) = answered(many, [(ids, how)])
    text = "".join(piece.text for piece in whole)
    stop = text[10:12]
    (cut,) = answered(many, [(ids, replace(how, stop=(stop,)))])
    assert "".join(piece.text for piece in cut) == text[: text.find(stop)]
    assert cut[-1].finish == "stop"
    assert cut[-1].n_tokens < 60
    asyncio.run(until(lambda: many.in_use == 0, "the place is still taken"))


def test_a_prompts_beginning_is_computed_once(many: BatchedEngine, endless: ChatModel) -> None:
    """Also behind an answer: its tokens are known to the next turn."""
    first = prompts(1, seed=5, longest=1)[0] * 40
    (pieces,) = answered(many, [(first, GREEDY)])
    assert pieces[-1].n_cached == 0
    behind = [*first, *greedy_ids(endless, first, 11)]
    again = [*behind, 9, 10, 11]
    (pieces,) = answered(many, [(again, GREEDY)])
    assert pieces[-1].n_cached == len(behind)
    assert told(pieces) == told(list(endless.pieces(again, GREEDY)))
    assert many.load().cached_tokens == len(behind)
    (pieces,) = answered(many, [(first, GREEDY)])
    assert pieces[-1].n_cached == len(first) - 1
    assert told(pieces) == told(list(endless.pieces(first, GREEDY)))


def greedy_ids(chat: ChatModel, ids: list[int], n: int) -> list[int]:
    known = list(ids)
    with torch.no_grad():
        for _ in range(n):
            known.append(int(chat.model(input_ids=torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]


def test_a_long_prompt_is_run_in_parts_between_the_tokens_of_others(endless: ChatModel) -> None:
    engine = BatchedEngine(endless, slots=4)
    engine._rounds.part = 16
    asked = [([5, 6], GREEDY), (prompts(1, seed=9)[0] * 9, GREEDY), ([8], GREEDY)]
    for (ids, how), pieces in zip(asked, answered(engine, asked), strict=True):
        assert told(pieces) == told(list(endless.pieces(ids, how)))
    engine.close()


def test_500_readers_that_leave_free_their_places_and_memory(many: BatchedEngine) -> None:
    async def leave() -> None:
        drawn = random.Random(0)
        for _ in range(10):
            streams = [many.submit(ids, LONG) for ids in prompts(50, seed=drawn.random())]
            for stream in streams[:32]:  # the others wait for a slot
                if drawn.random() < 0.4:
                    await anext(stream)
            for stream in streams:
                await stream.aclose()
        await until(lambda: many.in_use == 0, "places are still taken")
        await until(lambda: many.load().kv_used == 0.0, "memory is still taken")
        pieces = await collect(many.submit([5, 6], GREEDY))
        assert pieces[-1].finish == "length"

    asyncio.run(leave())


def test_more_than_may_wait_are_refused_at_once(endless: ChatModel) -> None:
    engine = BatchedEngine(endless, max_waiting=2, slots=3)

    async def overload() -> None:
        taken = [engine.submit([5, 6, 7], LONG) for _ in range(5)]
        with pytest.raises(EngineBusyError, match="2 requests wait already"):
            engine.submit([5], LONG)
        await until(lambda: engine.load().running == 3, "not all slots are used")
        assert (engine.load().waiting, engine.load().slots) == (2, 3)
        assert engine.load().kv_used > 0
        for stream in taken:
            await stream.aclose()
        await until(lambda: engine.in_use == 0, "places are still taken")

    asyncio.run(overload())
    engine.close()


def test_errors_of_one_request_end_no_other(many: BatchedEngine, endless: ChatModel) -> None:
    async def mixed() -> list[Any]:
        asked = [[], [10**6], [5, 6], [5] * endless.context, [5] * (endless.context + 9)]
        streams = [collect(many.submit(ids, GREEDY)) for ids in asked]
        return await asyncio.gather(*streams, return_exceptions=True)

    empty, unknown, good, full, over = asyncio.run(mixed())
    assert isinstance(empty, RecipeError)
    assert isinstance(unknown, ServeError)
    assert told(good) == told(list(endless.pieces([5, 6], GREEDY)))
    assert told(full) == [("", 0, "length")]
    assert told(over) == [("", 0, "length")]
    assert many.healthy()
    assert many.in_use == 0


@pytest.fixture
def spoiled(endless: ChatModel) -> Iterator[int]:
    """A word that makes logits that are no numbers."""
    weights = endless.model.get_input_embeddings().weight
    before = weights[77].clone()
    with torch.no_grad():
        weights[77] = float("nan")
    yield 77
    with torch.no_grad():
        weights[77] = before


def test_logits_that_are_no_numbers_end_their_request_alone(
    many: BatchedEngine, endless: ChatModel, spoiled: int
) -> None:
    async def both() -> list[Any]:
        streams = [collect(many.submit(ids, GREEDY)) for ids in ([5, spoiled], [5, 6])]
        return await asyncio.gather(*streams, return_exceptions=True)

    broken, good = asyncio.run(both())
    assert isinstance(broken, ServeError)
    assert told(good) == told(list(endless.pieces([5, 6], GREEDY)))


def test_an_engine_that_fails_every_request_counts_as_broken(
    many: BatchedEngine, spoiled: int
) -> None:
    for _ in range(FAILURES - 1):
        answered_with_error(many, [5, spoiled], GREEDY)
    assert many.healthy()
    answered_with_error(many, [5, spoiled], GREEDY)
    assert not many.healthy()
    answered(many, [([5, 6], GREEDY)])
    assert many.healthy()


def test_memory_bounds_what_runs_and_a_request_beyond_it_is_refused(endless: ChatModel) -> None:
    """64 KiB hold 128 tokens of this model: one request of 100 at a time."""
    engine = BatchedEngine(endless, slots=8, kv_gib=2**-12)
    tokens = engine._memory.tokens
    how = replace(GREEDY, max_new_tokens=100)
    assert 256 <= tokens < 2 * 512
    (good, *others), error = (
        answered(engine, [(ids, how) for ids in prompts(6, longest=20)]),
        answered_with_error(engine, [5] * 10, replace(GREEDY, max_new_tokens=500)),
    )
    assert all(pieces[-1].n_tokens == 100 for pieces in (good, *others))
    assert engine._memory.taken <= tokens
    if tokens < 512:
        assert isinstance(error, ServeError)
    engine.close()


def answered_with_error(engine: BatchedEngine, ids: list[int], how: Sampling) -> Any:
    async def one() -> Any:
        return await asyncio.gather(collect(engine.submit(ids, how)), return_exceptions=True)

    return asyncio.run(one())[0]


def test_closing_ends_running_and_waiting_answers(endless: ChatModel) -> None:
    engine = BatchedEngine(endless, slots=1)

    async def shut() -> None:
        running, waiting = engine.submit([5, 6], LONG), engine.submit([5, 6], LONG)
        await anext(running)
        await asyncio.to_thread(engine.close)
        for pieces in (running, waiting):
            with pytest.raises(ServeError, match="shutting down"):
                await collect(pieces)
        with pytest.raises(ServeError, match="shutting down"):
            engine.submit([5, 6], LONG)

    asyncio.run(shut())
    assert not engine.healthy()
    assert engine._memory.taken == 0


def test_a_model_that_cannot_be_batched_answers_one_at_a_time(
    endless: ChatModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows whose places are mixed up differ from rows alone, which is what the check is for."""
    right = lanes._Masks.__call__
    monkeypatch.setattr(lanes._Masks, "__call__", lambda s, places, c: right(s, places + 1, c))
    with pytest.raises(NotBatchedError, match="differ from rows alone"):
        BatchedEngine(endless)
    engine = embedded(endless, EngineOptions(path="x"))
    assert isinstance(engine, EmbeddedEngine)
    assert "answers one request at a time" in caplog.text
    engine.close()


def test_lanes_of_all_sizes(tiny_model: Path) -> None:
    sizes = [lanes.size_for(n, 4096) for n in (1, 256, 257, 500, 513, 769, 3000, 4096, 5000)]
    assert sizes == [256, 256, 384, 512, 768, 1024, 3072, 4096, 5000]
