"""Steps of fixed shapes write what plain steps write, for every family that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ft.model import decoding, fixed_cache
from raytune_ft.model.answers import Drawing, answer_all
from raytune_ft.model.capturable import NotFixedError, Watch
from raytune_ft.model.decoding import Decoder, Graphs
from raytune_ft.model.generate import stream_ids
from tests.families.checkpoints import SPECS, make
from tests.families.loaded import load
from tests.model.test_answers import model_of, prompts


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a cache of a few tokens grows on the way."""
    monkeypatch.setattr(decoding, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "TOKENS_AHEAD", 32)
    yield


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note the rows and the size of every step made from now on."""
    made: list[tuple[int, int]] = []
    real = decoding._Step.__init__

    def noted(self: Any, *args: Any) -> None:
        real(self, *args)
        made.append((self.rows, self.size))

    monkeypatch.setattr(decoding._Step, "__init__", noted)
    return made


def both(model: nn.Module, asked: list[list[int]], **how: Any) -> tuple[list[Any], Graphs]:
    """Answer the plain way and in fixed shapes; return the answers, which have to be the same."""
    graphs = Graphs("fixed")
    plain, found = (
        answer_all(model, asked, graphs=lent, **how) for lent in (Graphs("plain"), graphs)
    )
    assert found == plain
    return found, graphs


@pytest.mark.parametrize("kind", ["llama", "alibi", "window", "mixed"])
def test_rows_that_leave_and_caches_that_grow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    made = steps_of(monkeypatch)
    free, _ = both(model, prompts(), stop_ids=(), max_new_tokens=40)
    assert made == [(8, 64), (8, 128)], "7 rows take the room of 8"
    made.clear()
    stops = {free[i].ids[place] for i, place in ((0, 9), (1, 14), (2, 25), (4, 30))}
    both(model, prompts(), stop_ids=stops, max_new_tokens=40)
    assert min(rows for rows, _ in made) < 8, "a row that ended gives its place back"
    drawing = {"drawing": Drawing(0.9, 0.9), "seeds": list(range(7))}
    both(model, prompts(), stop_ids=stops, max_new_tokens=40, **drawing)


@pytest.mark.parametrize("family", tuple(SPECS))
def test_every_family(family: str, tmp_path: Path) -> None:
    model = load(make(family, tmp_path / family), dtype="float32")
    _, graphs = both(model, [[5, 9, 30], [7] * 12], stop_ids=(), max_new_tokens=20)
    assert graphs.seen_safe


def test_streams_and_the_end_of_the_context() -> None:
    model = model_of("llama")
    kept = Graphs("fixed")
    for prompt in ([7] * 60, [3, 4, 5], [9] * 96, [6]):
        plain, found = (
            list(stream_ids(model, prompt, stop_ids=(), max_new_tokens=99, graphs=lent))
            for lent in (Graphs("plain"), kept)
        )
        assert found == plain
        assert len(found) == 96 - len(prompt)
    # a row at the end of the context goes on unread beside one that has far to go
    both(model, [[7] * 80, [8] * 3], stop_ids=(), max_new_tokens=60)


def test_a_kept_step_serves_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    made = steps_of(monkeypatch)
    kept = Graphs("fixed")
    first = answer_all(model, prompts(4), stop_ids=(), max_new_tokens=20, graphs=kept)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    second = answer_all(model, prompts(4), stop_ids=(), max_new_tokens=20, graphs=kept)
    assert made == [(4, 64)]
    assert second != first
    assert second == answer_all(model, prompts(4), stop_ids=(), max_new_tokens=20)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    answer_all(model, prompts(4), stop_ids=(), max_new_tokens=20, graphs=kept)
    assert made == [(4, 64)] * 2, "weights that are elsewhere need another step"


def test_short_answers_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    made = steps_of(monkeypatch)
    both(model_of("llama"), prompts(3), stop_ids=(), max_new_tokens=decoding.WORTHWHILE - 1)
    assert not made


def test_memory_that_ends_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second, larger cache finds no room: the tokens so far are kept."""
    model = model_of("mixed")
    expected = answer_all(model, prompts(), stop_ids=(), max_new_tokens=40)

    def check(_device: torch.device, needed: int) -> None:
        if needed > 2 * 8 * 64 * 2 * 2 * 8 * 4:
            raise NotFixedError("no room")

    monkeypatch.setattr(decoding, "_check_memory", check)
    made = steps_of(monkeypatch)
    found = answer_all(model, prompts(), stop_ids=(), max_new_tokens=40, graphs=Graphs("fixed"))
    assert found == expected
    assert made == [(8, 64)]


WATCHED: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number": lambda x: float(x.sum()),
    "a decision": lambda x: bool((x > 0).any()),
    "places": lambda x: (x > 0).nonzero(),
    "a selection": lambda x: x[x > 0],
    "an assignment": lambda x: x.index_put_((x > 9,), torch.zeros(1)),
    "a mask": lambda x: x.masked_select(x > 0),
    "a choice": lambda x: torch.multinomial(x.abs() + 1, 1),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "a move": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("what", WATCHED)
def test_the_watch_stops_what_a_graph_cannot_repeat(what: str) -> None:
    x = torch.linspace(-1, 1, 6)
    with pytest.raises(NotFixedError), Watch():
        WATCHED[what](x)


def test_the_watch_lets_a_layer_pass() -> None:
    x = torch.randn(1, 2, 3, 8)
    with Watch(), torch.no_grad():
        attended = nn.functional.scaled_dot_product_attention(x, x, x)
        moved = attended.transpose(1, 2).reshape(3, -1)[torch.tensor([0, 2])]
        assert moved.to(torch.bfloat16).float().shape == (2, 16)


def test_a_model_that_asks_goes_on_the_plain_way() -> None:
    model: PreTrainedModel = model_of("llama")
    asked: list[float] = []
    model.model.norm.register_forward_hook(lambda _m, _i, out: asked.append(float(out.sum())))
    _, graphs = both(model, prompts(3), stop_ids=(), max_new_tokens=20)
    assert graphs.refused
    assert len(asked) == 40


def test_sizes_of_the_cache() -> None:
    model = model_of("llama").eval()
    decoder = Decoder(model, prompts(3), 20, Graphs("fixed"))
    with torch.no_grad():
        decoder.logits()
        place = torch.zeros(1, dtype=torch.long)
        cache = fixed_cache.fixed(decoder.cache, 32, place, 4)
    held = sum(
        states.numel() * states.element_size()
        for layer in cache.layers
        for states in (layer.keys, layer.values)
    )
    assert fixed_cache.bytes_of(decoder.cache, 4, 32) == held
