"""Generation: against transformers' own, and its promises on stopping and state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loading import load_model

CPU = torch.device("cpu")
PROMPT = [5, 9, 30, 77, 12]


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    return load_model(tiny_model, ModelSection(path=str(tiny_model)), CPU)


def adapted(folder: Path, quantization: str = "none") -> Any:
    section = ModelSection.model_validate({"path": str(folder), "quantization": quantization})
    model = attach(load_model(folder, section, CPU), LoraSection(r=4, dropout=0.5), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def greedy(model: Any, n: int) -> list[int]:
    found = model.generate(
        input_ids=torch.tensor([PROMPT]), do_sample=False, min_new_tokens=n, max_new_tokens=n
    )
    ids: list[int] = found[0, len(PROMPT) :].tolist()
    return ids


def test_greedy_equals_transformers(plain: Any) -> None:
    expected = greedy(plain, 24)
    stop = {1} - set(expected)  # min_new_tokens keeps transformers from its own stop id
    assert list(stream_ids(plain, PROMPT, stop_ids=stop, max_new_tokens=24)) == expected


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_greedy_with_an_adapter_equals_transformers(tiny_model: Path, quantization: str) -> None:
    model = adapted(tiny_model, quantization).eval()
    ours = list(stream_ids(model, PROMPT, stop_ids=(), max_new_tokens=12))
    assert ours == greedy(model, 12)


def test_training_state_and_modes_come_back(tiny_model: Path) -> None:
    """Dropout is off while generating and back on afterwards, even for an abandoned answer."""
    model = adapted(tiny_model)
    model.train()
    model.base_model.model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    first = stream_ids(model, PROMPT, stop_ids=(), max_new_tokens=20)
    start = [next(first), next(first)]
    assert not model.training
    first.close()  # type: ignore[attr-defined]
    assert {name: module.training for name, module in model.named_modules()} == before
    whole = list(stream_ids(model, PROMPT, stop_ids=(), max_new_tokens=20))
    assert whole[:2] == start
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(plain: Any) -> None:
    free = list(stream_ids(plain, PROMPT, stop_ids=(), max_new_tokens=20))
    stop = free[6]
    ended = list(stream_ids(plain, PROMPT, stop_ids={stop}, max_new_tokens=20))
    assert ended == free[: free.index(stop)]


def test_cancelling_stops_within_one_token(plain: Any) -> None:
    asked: list[int] = []

    def take() -> Iterator[int]:
        stream = stream_ids(
            plain, PROMPT, stop_ids=(), max_new_tokens=50, cancelled=lambda: len(asked) >= 3
        )
        for id_ in stream:
            asked.append(id_)
            yield id_

    assert len(list(take())) == 3


def test_seeds_decide_samples_and_leave_the_global_state_alone(plain: Any) -> None:
    def sample(seed: int | None) -> list[int]:
        return list(
            stream_ids(
                plain, PROMPT, stop_ids=(), max_new_tokens=16, temperature=1.5, top_p=0.95,
                top_k=50, seed=seed,
            )
        )  # fmt: skip

    state = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)
    assert torch.equal(state, torch.random.get_rng_state())


def test_top_k_of_one_is_greedy_and_a_penalty_forbids_loops(plain: Any) -> None:
    free = list(stream_ids(plain, PROMPT, stop_ids=(), max_new_tokens=12))
    assert free == list(
        stream_ids(plain, PROMPT, stop_ids=(), max_new_tokens=12, temperature=2.0, top_k=1)
    )
    tough = stream_ids(plain, PROMPT, stop_ids=(), max_new_tokens=40, repetition_penalty=1e6)
    seen = list(tough)
    assert len(set(seen) | set(PROMPT)) == 45


def test_the_context_is_kept(plain: Any) -> None:
    context = plain.config.max_position_embeddings
    nearly = [7] * (context - 2)
    assert len(list(stream_ids(plain, nearly, stop_ids=(), max_new_tokens=9))) == 2
    assert list(stream_ids(plain, [7] * context, stop_ids=(), max_new_tokens=9)) == []
    with pytest.raises(RecipeError, match="513 tokens, and the model's context is 512"):
        stream_ids(plain, [7] * (context + 1), stop_ids=(), max_new_tokens=9)
    with pytest.raises(RecipeError, match="no tokens"):
        stream_ids(plain, [], stop_ids=(), max_new_tokens=9)
