"""Steps replayed from a CUDA graph write what plain steps write, and leave nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.model import decoding, fast
from raytune_ft.model.adapter import attach
from raytune_ft.model.answers import Drawing, answer_all
from raytune_ft.model.decoding import Graphs
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loading import load_model
from tests.families.checkpoints import SPECS, make
from tests.families.loaded import random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "nf4_fast": {"dtype": "bfloat16", "quantization": "nf4"},
}
PROMPTS = [[5, 9, 30, 77, 12], [3] * 17, [60], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
DRAWING = Drawing(temperature=0.9, top_p=0.9)
TOKENS = 120
CLOSE = {"float32": 1e-4, "bfloat16": 0.1, "nf4": 0.1, "nf4_fast": 0.1}
"""Of the logits: other kernels of attention add up in another order."""


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a cache grows twice within a test's tokens."""
    monkeypatch.setattr(decoding, "SMALLEST", 32)
    monkeypatch.setattr(decoding, "TOKENS_AHEAD", 128)
    yield
    gc.collect()


def adapted(folder: Path, kind: str) -> Any:
    section = ModelSection.model_validate({"path": str(folder), **KINDS[kind]})
    model = attach(load_model(folder, section, CUDA), LoraSection(r=4, dropout=0.5), seed=1)
    shake(model, 2)
    with torch.no_grad():  # an untrained model repeats one word; wider logits make texts of it
        model.get_output_embeddings().weight.normal_(std=0.3)
    if kind.endswith("fast"):
        assert fast.install(model, CUDA, wanted=True).counts
    return model.train()


def shake(model: Any, seed: int) -> None:
    """Change the adapter in place, as an optimizer does."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=generator)


def ask(model: Any, graphs: Graphs | None, **how: Any) -> list[list[int]]:
    how = {"stop_ids": (), "max_new_tokens": TOKENS, **how}
    return [answer.ids for answer in answer_all(model, PROMPTS, graphs=graphs, **how)]


def drawn() -> dict[str, Any]:
    return {"drawing": DRAWING, "seeds": list(range(len(PROMPTS)))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [dict, drawn], ids=["greedy", "drawn"])
def test_replayed_steps_are_the_steps_themselves(
    tiny_model: Path, kind: str, how: Callable[[], dict[str, Any]]
) -> None:
    """Fixed shapes with and without a graph: the same kernels, so the same ids in every type."""
    model = adapted(tiny_model, kind)
    graphs, bare = Graphs(), Graphs()
    bare.may_capture = False
    found = ask(model, graphs, **how())
    assert graphs.captured >= 2, "a cache that grows is captured again"
    assert found == ask(model, bare, **how())
    assert bare.captured == 0
    graphs.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_way_has_the_same_logits_behind_the_same_tokens(
    tiny_model: Path, kind: str
) -> None:
    model = adapted(tiny_model, kind).eval()
    graphs = Graphs()
    both = [decoding.Decoder(model, PROMPTS, TOKENS, lent) for lent in (Graphs("plain"), graphs)]
    forced = random_ids(90, TOKENS, len(PROMPTS)).tolist()
    with torch.no_grad():
        for place, ids in enumerate(forced):
            plain, found = (decoder.logits() for decoder in both)
            if place in (40, 60):  # two rows end, and later another one
                some = list(range(len(plain) // 2))
                for decoder in both:
                    decoder.keep(some)
                plain, found = plain[some], found[some]
            assert (plain - found).abs().max() < CLOSE[kind] * plain.abs().max(), place
            for decoder in both:
                decoder.append(ids[: len(plain)])
    assert graphs.captured >= 3
    both[1].close()
    graphs.close()


def test_float32_answers_are_those_of_the_plain_way(tiny_model: Path) -> None:
    model = adapted(tiny_model, "float32")
    free = ask(model, Graphs("plain"))
    stops = {free[0][20], free[1][50], free[2][90]}  # rows leave on the way
    for more in ({}, {"stop_ids": stops}, drawn()):
        assert ask(model, None, **more) == ask(model, Graphs("plain"), **more)
    for seed, prompt in enumerate(PROMPTS):
        one: dict[str, Any] = {"stop_ids": (), "max_new_tokens": 60, "seed": seed}
        for temperature in (0.0, 0.9):
            plain, graphed = (
                list(stream_ids(model, prompt, temperature=temperature, graphs=lent, **one))
                for lent in (Graphs("plain"), None)
            )
            assert plain == graphed


def test_weights_that_changed_in_place_answer_anew(tiny_model: Path) -> None:
    model = adapted(tiny_model, "float32")
    kept = Graphs()
    few = {"max_new_tokens": 12}  # of one shape, so that a graph is there to be kept
    first = ask(model, kept, **few)
    shake(model, 3)
    second = ask(model, kept, **few)
    assert first != second
    assert second == ask(model, Graphs("plain"), **few)
    assert kept.captured == 1
    kept.close()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_modes_and_random_states_are_as_before(tiny_model: Path, kind: str) -> None:
    model = adapted(tiny_model, kind)
    ask(model, None)  # what CUDA itself keeps from its first time
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), torch.cuda.get_rng_state(CUDA))
    gc.collect()
    before = torch.cuda.memory_allocated(CUDA)
    for seed in (1, 2):
        ask(model, None, **drawn())
        shake(model, seed)
        gc.collect()
        assert torch.cuda.memory_allocated(CUDA) == before
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state(CUDA))
    assert [module.training for module in model.modules()] == modes
    # dropout draws as ever behind a capture
    nn.functional.dropout(torch.ones(8, device=CUDA), 0.5)
    assert not torch.equal(states[1], torch.cuda.get_rng_state(CUDA))


def test_cancelling_and_counting_go_on(tiny_model: Path) -> None:
    model = adapted(tiny_model, "bfloat16")
    counted: list[int] = []
    ask(model, None, max_new_tokens=40, after_token=lambda: counted.append(1))
    assert len(counted) == 40
    seen: list[int] = []
    stream = stream_ids(
        model, PROMPTS[0], stop_ids=(), max_new_tokens=90, cancelled=lambda: len(seen) >= 33
    )
    for id_ in stream:
        seen.append(id_)
    assert len(seen) == 33


class Asks(nn.Module):
    """Looks at a number on the host."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) if float(x.sum()) < 1e9 else x


def test_a_model_that_asks_the_device_is_left_alone(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the watch did not see it: a capture that failed leaves torch whole."""
    model = adapted(tiny_model, "float32")
    expected = ask(model, Graphs("plain"))
    layers = model.base_model.model.model.layers
    layers[0].mlp = Asks(layers[0].mlp)
    watched, blind = Graphs(), Graphs()
    assert ask(model, watched) == expected
    assert (watched.captured, watched.seen_safe) == (0, False)
    assert not caplog.records
    blind.seen_safe = True
    state = torch.cuda.get_rng_state(CUDA)
    assert ask(model, blind) == expected
    assert (blind.captured, blind.may_capture) == (0, False)
    assert "not captured" in caplog.text
    assert torch.equal(state, torch.cuda.get_rng_state(CUDA))
    nn.functional.dropout(torch.ones(8, device=CUDA), 0.5)
    torch.cuda.empty_cache()
    layers[0].mlp = layers[0].mlp.inner
    again = Graphs()
    assert ask(model, again) == expected
    assert again.captured
    again.close()


@pytest.mark.parametrize("family", tuple(SPECS))
def test_every_family_answers_alike(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / family)
    section = ModelSection.model_validate({"path": str(folder), "dtype": "float32"})
    model = load_model(folder, section, CUDA)
    graphs = Graphs()
    prompts = [[5, 9, 30], [7] * 12]
    plain, found = (
        answer_all(model, prompts, stop_ids=(), max_new_tokens=50, graphs=lent)
        for lent in (Graphs("plain"), graphs)
    )
    assert found == plain
    print(f"{family}: {graphs.captured} graphs")
    graphs.close()
