"""vLLM's side of the interface, against a stand-in for vLLM that generates with the tiny model.

vLLM itself needs a GPU; the last tests run it where it is installed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from raytune_ft.chat import ChatModel, Piece, Sampling, find_source, open_chat
from raytune_ft.chat.writing import spelled
from raytune_ft.errors import CheckpointError, ServeError
from raytune_ft.model.sampling import Chooser, Draw, Told
from raytune_ft.serving.engine import EngineBusyError
from raytune_ft.serving.engines import EngineOptions, build, vllm
from raytune_ft.serving.engines.vllm import VllmEngine
from tests.conftest import make_tiny_model
from tests.serving.test_adapters import write_adapter

HOW = Sampling(temperature=0.0, max_new_tokens=12)


@dataclass
class Params:
    """What the stand-in looks at of vLLM's SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    frequency_penalty: float
    presence_penalty: float
    logprobs: int | None
    detokenize: bool
    output_kind: str


class Lora(NamedTuple):
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class StandIn:
    """Generates like vLLM's AsyncLLM: ids in, outputs with what is new, two tokens at a time."""

    errored = False

    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat
        self.lora: list[Any] = []
        self.read: list[str] = []
        self.unreadable = False
        self.open = 0
        self.closed = False

    async def generate(
        self, prompt: dict[str, list[int]], params: Params, _id: str, *, lora_request: Any
    ) -> AsyncIterator[Any]:
        assert params.detokenize is False
        self.lora.append(lora_request)
        if prompt["prompt_token_ids"] == [1]:
            raise ValueError("no such prompt")
        self.open += 1
        try:
            ids, new, told = list(prompt["prompt_token_ids"]), [], []
            rule = Sampling(params.temperature, params.top_p, max(params.top_k, 0))
            chooser = Chooser([Draw(replace(rule, logprobs=params.logprobs))], torch.device("cpu"))
            for n in range(params.max_tokens):
                await asyncio.sleep(0)
                with torch.no_grad():
                    found = chooser.choose(self.chat.model(torch.tensor([ids])).logits[:, -1])
                ids.append(int(found.ids))
                new.append(ids[-1])
                told.append(found.told.get(0))
                ended = ids[-1] in params.stop_token_ids
                if len(new) == 2 or ended or n + 1 == params.max_tokens:
                    logprobs = None if params.logprobs is None else [as_vllm(t) for t in told]
                    output = SimpleNamespace(token_ids=new, logprobs=logprobs)
                    yield SimpleNamespace(outputs=[output], num_cached_tokens=3)
                    new, told = [], []
                if ended:
                    return
        finally:
            self.open -= 1

    async def add_lora(self, request: Lora) -> bool:
        if self.unreadable:
            raise RuntimeError("Call to add_lora method failed: no DoRA")
        self.read.append(request.lora_name)
        return True

    def shutdown(self) -> None:
        self.closed = True


def as_vllm(told: Told | None) -> dict[int, Any]:
    """Write chances as vLLM does: a rank each, the chosen token among the likeliest or behind."""
    assert told is not None
    found = {id_: SimpleNamespace(logprob=p, rank=k + 1) for k, (id_, p) in enumerate(told.top)}
    found.setdefault(told.id, SimpleNamespace(logprob=told.logprob, rank=99))
    return found


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are imported of vLLM."""
    names = {
        "vllm": {"SamplingParams": Params},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Lora},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatModel:
    return open_chat(str(tiny_model), device="cpu")


@pytest.fixture
def engine(
    chat: ChatModel, tiny_model: Path, package: None, tmp_path: Path
) -> Iterator[VllmEngine]:
    write_adapter(tmp_path / "ada", tiny_model, 1)
    source = find_source(str(tiny_model))
    engine = VllmEngine(
        source, 1, slots=2, adapters=str(tmp_path), start=lambda *_given: StandIn(chat)
    )
    yield engine
    engine.close()


async def collect(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]


def told(pieces: list[Piece]) -> list[tuple[str, int, str | None]]:
    return [(piece.text, piece.n_tokens, piece.finish) for piece in pieces]


def test_its_tokens_become_our_pieces(engine: VllmEngine, chat: ChatModel) -> None:
    for ids in ([5, 6, 7], [90] * 9, [41, 77]):
        for how in (HOW, replace(HOW, max_new_tokens=1), replace(HOW, stop=("e",))):
            found = asyncio.run(ask(engine, ids, how))
            assert told(found) == told(list(chat.pieces(ids, how)))
            assert found[-1].n_cached == 3
    assert engine.load().cached_tokens == 9 * 3
    full = asyncio.run(ask(engine, [5] * engine.context, HOW))
    assert told(full) == [("", 0, "length")]


async def ask(engine: VllmEngine, ids: list[int], how: Sampling, **more: Any) -> list[Piece]:
    return await collect(engine.submit(ids, how, **more))


def test_chances_are_ranked_and_hold_the_chosen_token_once(
    engine: VllmEngine, chat: ChatModel
) -> None:
    for k in (0, 1, 4):
        how = replace(HOW, logprobs=k, max_new_tokens=5)
        found, alone = asyncio.run(ask(engine, [5, 6], how)), list(chat.pieces([5, 6], how))
        assert [c.bytes for p in found for c in p.chances] == [
            c.bytes for p in alone for c in p.chances
        ]
        assert {len(c.top) for p in found for c in p.chances} == {k}


def test_names_reach_vllm_as_adapters(engine: VllmEngine, tmp_path: Path) -> None:
    assert engine.models() == (engine.name, "ada")
    for name in ("ada", None, "ada"):
        asyncio.run(ask(engine, [5, 6], HOW, model=name))
    folder = str((tmp_path / "ada").resolve())
    assert engine._llm.lora == [("ada", 1, folder), None, ("ada", 1, folder)]
    assert engine._llm.read == ["ada"]
    with pytest.raises(ServeError, match="does not exist"):
        asyncio.run(ask(engine, [5, 6], HOW, model="../ada"))


def test_an_adapter_that_vllm_does_not_read_costs_its_own_request(engine: VllmEngine) -> None:
    engine._llm.unreadable = True
    with pytest.raises(CheckpointError, match=r"ada: vLLM does not read it \(.*no DoRA"):
        asyncio.run(ask(engine, [5, 6], HOW, model="ada"))
    assert engine._llm.lora == []
    assert asyncio.run(ask(engine, [5, 6], HOW))[-1].finish is not None
    engine._llm.unreadable = False
    asyncio.run(ask(engine, [5, 6], HOW, model="ada"))
    assert engine._llm.read == ["ada"]


def test_readers_errors_bounds_and_the_end(engine: VllmEngine) -> None:
    async def all_of_it() -> None:
        taken = [engine.submit([5, 6], replace(HOW, max_new_tokens=400)) for _ in range(3)]
        with pytest.raises(EngineBusyError, match="1 requests wait already"):
            engine.submit([5], HOW)
        assert (engine.load().running, engine.load().waiting) == (2, 1)
        for stream in taken[:2]:
            await anext(stream)
            await stream.aclose()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if engine._llm.open == len(engine._running) == 1:
                break
        assert engine._llm.open == len(engine._running) == 1
        with pytest.raises(ValueError, match="no such prompt"):
            await collect(engine.submit([1], HOW))
        engine.close()
        with pytest.raises(ServeError, match="shutting down"):
            await collect(taken[2])
        with pytest.raises(ServeError, match="shutting down"):
            engine.submit([5], HOW)

    asyncio.run(all_of_it())
    assert engine._llm.closed
    assert not engine.healthy()


@pytest.mark.skipif(vllm.is_installed(), reason="vLLM is installed")
def test_asked_for_and_absent_is_one_line(tiny_model: Path) -> None:
    with pytest.raises(ServeError, match=r"not installed; pip install 'ray\[llm\]'"):
        build(EngineOptions(path=str(tiny_model), engine="vllm"))


def test_what_it_cannot_serve_is_said(tiny_model: Path) -> None:
    with pytest.raises(ServeError, match="quantised"):
        VllmEngine(find_source(str(tiny_model), 4), start=lambda *_given: None)


REAL = [
    pytest.mark.gpu,
    pytest.mark.skipif(not vllm.is_installed(), reason="needs vLLM"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = {"model": 0.05, "ada": 0.25}
"""Between logarithms in bfloat16 and in float32; plain passes on a CPU differ by 0.01 and 0.14."""
PROMPTS = ([5, 6, 7], [90] * 9, [41, 77], list(range(20, 90)))
Ask = Callable[..., Coroutine[Any, Any, list[Piece]]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter beside it, with heads as wide as vLLM's kernels of attention ask."""
    root = tmp_path_factory.mktemp("real")
    (root / "model").mkdir()
    make_tiny_model(root / "model", hidden_size=256, intermediate_size=512)
    write_adapter(root / "adapters" / "ada", root / "model", 1)
    return root


def with_vllm(real: Path, use: Callable[[VllmEngine, Ask], Coroutine[Any, Any, None]]) -> None:
    """Run `use` beside vLLM in one event loop, as the endpoint does."""
    options = EngineOptions(
        path=str(real / "model"), engine="vllm", slots=8, adapters=str(real / "adapters")
    )

    async def all_of_it() -> None:
        engine = build(options)
        assert isinstance(engine, VllmEngine)

        async def ask_it(ids: list[int], how: Sampling, **more: Any) -> list[Piece]:
            return await ask(engine, ids, how, **more)

        try:
            await use(engine, ask_it)
        finally:
            engine.close()

    asyncio.run(all_of_it())


class TestVllmItself:
    """Real answers beside float32 passes of the same weights."""

    pytestmark = REAL

    def test_tokens_chances_and_adapters(self, real: Path) -> None:
        """Every token is a likeliest one, and as likely as it is said to be."""
        how = replace(HOW, max_new_tokens=24, logprobs=4)
        found: dict[str | None, list[list[Piece]]] = {}

        async def use(engine: VllmEngine, ask_it: Ask) -> None:
            assert engine.models() == (engine.name, "ada")
            for model in (None, "ada", None):
                some = [ask_it(ids, how, model=model) for ids in PROMPTS]
                found[model] = await asyncio.gather(*some)
            assert engine.healthy()
            assert engine.load().cached_tokens > 0

        with_vllm(real, use)
        for name, folder in ((None, real / "model"), ("ada", real / "adapters" / "ada")):
            chat = open_chat(str(folder), bits=32, device="cpu")
            for ids, pieces in zip(PROMPTS, found[name], strict=True):
                check(chat, ids, pieces, CLOSE[folder.name])
        assert found[None] != found["ada"]

    def test_seeds_penalties_cancels_and_the_end(self, real: Path) -> None:
        drawn = Sampling(1.0, 1.0, 0, 24, seed=3)

        async def use(engine: VllmEngine, ask_it: Ask) -> None:
            first, again, other, *_ = await asyncio.gather(
                *(ask_it([5, 6], replace(drawn, seed=seed)) for seed in (3, 3, 4, 5, 6))
            )
            assert told(first) == told(again) != told(other)
            punished = await ask_it([5, 6], replace(HOW, frequency_penalty=2.0, top_k=5))
            assert punished[-1].finish in ("stop", "length")
            stopped = engine.submit([5, 6], replace(drawn, max_new_tokens=400))
            await anext(stopped)
            await stopped.aclose()
            theirs = engine._llm.output_processor
            for _ in range(200):
                await asyncio.sleep(0.01)
                if not engine._running and not theirs.has_unfinished_requests():
                    break
            assert not engine._running
            assert not theirs.has_unfinished_requests()
            last = engine.submit([5, 6], replace(drawn, max_new_tokens=400))
            await anext(last)
            engine.close()
            with pytest.raises(ServeError, match="shutting down"):
                await collect(last)

        with_vllm(real, use)


def check(chat: ChatModel, ids: Sequence[int], pieces: Sequence[Piece], close: float) -> None:
    """Compare an answer's tokens and chances with passes over what it wrote so far."""
    words = {
        spelled(chat.tokenizer, id_)[1]: id_
        for id_ in range(chat.model.get_input_embeddings().weight.shape[0])
    }
    known, chances = list(ids), [chance for piece in pieces for chance in piece.chances]
    assert len(chances) == pieces[-1].n_tokens
    for chance in chances:
        with torch.no_grad():
            expected = chat.model(torch.tensor([known])).logits[0, -1].float().log_softmax(-1)
        chosen = words[chance.bytes]
        assert expected[chosen] > expected.max() - close
        assert abs(expected[chosen] - chance.logprob) < close
        for _, spelling, logprob in chance.top:
            assert abs(expected[words[spelling]] - logprob) < close
        assert len(chance.top) == 4
        known.append(chosen)
    assert pieces[-1].finish in ("stop", "length")
