"""The engine on a GPU: captured passes are the passes themselves; memory, seeds, cancels."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.chat import ChatModel, Piece, Sampling, open_chat
from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.model import lanes
from raytune_ft.model.adapter import attach
from raytune_ft.model.lanes import Lane
from raytune_ft.model.loading import load_model
from raytune_ft.serving.engines.batched import BatchedEngine
from tests.families.checkpoints import SPECS, make
from tests.gpu.test_decoding import adapted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
KINDS = ["float32", "bfloat16", "nf4"]
CLOSE = {"float32": 1e-4, "bfloat16": 0.05, "nf4": 0.05}
"""Of the largest logit: other kernels of attention add up in another order."""
DRAWN = Sampling(0.9, 0.9, 0, 40, seed=3)


class Endless(ChatModel):
    stop_ids = frozenset()  # type: ignore[assignment]


def prompts(count: int, words: int = 250) -> list[list[int]]:
    drawn = random.Random(1)
    return [[drawn.randrange(3, words) for _ in range(drawn.randint(1, 60))] for _ in range(count)]


def forced(lane: Lane, steps: int) -> torch.Tensor:
    """Begin four prompts in two passes, write the same tokens behind them; return all logits."""
    drawn, found = random.Random(2), []
    words = min(lane.model.get_input_embeddings().weight.shape[0], 250)  # type: ignore[operator]
    some = prompts(4, words)
    for pair in (some[:2], some[2:]):
        for _ in pair:
            lane.join([], 0)
        found.append(lane.extend(pair).clone())
    for step in range(steps):
        if step == steps // 2:
            lane.leave(1)
        found.append(lane.decode([drawn.randrange(3, words) for _ in lane.lengths]).clone())
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_passes_are_the_passes_themselves(tiny_model: Path, kind: str) -> None:
    """The same shapes with and without graphs: the same kernels, so the same bits."""
    model = adapted(tiny_model, kind).eval()
    with torch.no_grad():
        like = lanes.probed(model)
        plain, graphed = (Lane(model, like, 384, 8) for _ in range(2))
        plain._graphs.may = False
        expected = forced(plain, 24)
        for _ in range(3):  # captures in the second, replays in the third
            graphed.lengths.clear()
            assert torch.equal(forced(graphed, 24), expected)
        captured = [made for made in graphed._graphs._known.values() if made is not None]
        assert len(captured) >= 2
        assert graphed._graphs.may
        graphed.close()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_side_by_side_are_rows_alone(tiny_model: Path, kind: str) -> None:
    model = adapted(tiny_model, kind).eval()
    with torch.no_grad():
        lane = Lane(model, lanes.probed(model), 256, 4)
        some = prompts(3)
        for _ in some:
            lane.join([], 0)
        found = [lane.extend(some).clone()]
        known = [list(ids) for ids in some]
        for _ in range(6):
            ids = [int(row.argmax()) for row in found[-1]]
            for row, id_ in zip(known, ids, strict=True):
                row.append(id_)
            found.append(lane.decode(ids).clone())
        for place, row in enumerate(known):
            given = torch.tensor([row], device=CUDA)
            expected = model(input_ids=given, use_cache=False).logits[0, -1].float()
            far = (found[-1][place] - expected).abs().max() / expected.abs().max()
            assert far < CLOSE[kind]


@pytest.mark.parametrize("family", SPECS)
def test_every_family_can_be_captured_or_says_why(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(family, tmp_path / family)
    model: Any = load_model(folder, ModelSection(path=str(folder)), CUDA).eval()
    with torch.no_grad():
        lane = Lane(model, lanes.probed(model), 256, 8)
        first = forced(lane, 12)
        lane.lengths.clear()
        assert torch.allclose(forced(lane, 12), first, atol=1e-3)
        assert lane._graphs.may, caplog.text
        lane.close()


@pytest.fixture
def chat(tiny_model: Path) -> ChatModel:
    opened = open_chat(str(tiny_model), bits=32, device="cuda")
    model = attach(opened.model, LoraSection(r=4), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
        model.get_output_embeddings().weight.normal_(std=0.3)
    return Endless(**{**vars(opened), "model": model.eval().float()})


@pytest.fixture
def engine(chat: ChatModel) -> Iterator[BatchedEngine]:
    engine = BatchedEngine(chat, max_waiting=400, slots=64)
    yield engine
    engine.close()


async def collect(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]


def answered(engine: BatchedEngine, asked: list[tuple[list[int], Sampling]]) -> list[Any]:
    async def together() -> list[list[Piece]]:
        return await asyncio.gather(*[collect(engine.submit(ids, how)) for ids, how in asked])

    found = asyncio.run(together())
    return [[(p.text, p.n_tokens, p.finish) for p in pieces] for pieces in found]


def test_a_seeds_answer_is_the_same_alone_and_among_others(engine: BatchedEngine) -> None:
    """In float32 but for ties; rules of all kinds, so that sampling runs in all its forms."""
    rules = [
        DRAWN,
        Sampling(0.0, max_new_tokens=40),
        Sampling(1.0, 1.0, 0, 40, seed=4),
        Sampling(0.7, 0.95, 40, 40, seed=5, logprobs=2),
        Sampling(1.0, 1.0, 5, 40, seed=6, frequency_penalty=1.0),
    ]
    asked = [(ids, rule) for ids in prompts(10) for rule in rules]
    together = answered(engine, asked)
    alone = [answered(engine, [one])[0] for one in asked]
    differ = sum(one != other for one, other in zip(together, alone, strict=True))
    assert differ <= 1
    assert len({str(answer) for answer in together}) > 40


def test_the_base_beside_its_adapter(engine: BatchedEngine, tiny_model: Path) -> None:
    """Each lane captures the network as it is for its own model."""
    how = Sampling(0.0, max_new_tokens=30)

    async def both() -> list[Any]:
        streams = [
            collect(engine.submit(prompts(1)[0], how, model=name))
            for _ in range(4)
            for name in engine.models()
        ]
        return await asyncio.gather(*streams)

    assert engine.models()[1:] == ("base",)
    for _ in range(3):
        texts = ["".join(p.text for p in pieces) for pieces in asyncio.run(both())]
        assert len(set(texts[::2])) == len(set(texts[1::2])) == 1
        assert texts[0] != texts[1]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("still so after 2 s")


def test_readers_that_leave_free_places_and_memory(engine: BatchedEngine) -> None:
    async def leave() -> None:
        for _ in range(5):
            streams = [engine.submit(ids, Sampling(max_new_tokens=400)) for ids in prompts(60)]
            await anext(streams[0])
            for stream in streams:
                await stream.aclose()
        await until(lambda: engine.in_use == 0 and engine.load().kv_used == 0.0)

    asyncio.run(leave())
    memory = engine._memory
    assert memory.taken <= memory.tokens
    before = torch.cuda.memory_allocated()
    memory.spare()
    assert torch.cuda.memory_allocated() < before
