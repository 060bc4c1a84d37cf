"""Choosing tokens: each row by itself, with the shares that transformers' own processors give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raytune_ft.chat import Sampling
from raytune_ft.model.generate import logits_processors
from raytune_ft.model.sampling import FIRST, Chooser, Draw

CPU = torch.device("cpu")
WORDS = 3000
RULES = [
    Sampling(0.0), Sampling(1.0, 1.0, 0), Sampling(0.7, 0.9, 0), Sampling(0.1, 0.75, 40),
    Sampling(1.5, 1.0, 2 * FIRST), Sampling(2.0, 0.99, 0), Sampling(1.0, 0.5, 3),
    Sampling(1.0, 1.0, 0, logprobs=2), Sampling(1.0, 1.0, 0, frequency_penalty=1.0),
]  # fmt: skip


def choose(rules: list[Sampling], logits: torch.Tensor, times: int = 1) -> list[list[int]]:
    """Return what each of several steps over the same logits chooses."""
    chooser = Chooser([Draw(rule) for rule in rules], CPU)
    return [chooser.choose(logits).ids.tolist() for _ in range(times)]


def test_a_row_is_chosen_for_as_if_it_were_alone() -> None:
    rules = [replace(rule, seed=seed) for seed in range(4) for rule in RULES]
    logits = torch.randn(len(rules), WORDS, generator=torch.Generator().manual_seed(0)) * 3
    together = choose(rules, logits, times=3)
    for place, rule in enumerate(rules):
        alone = choose([rule], logits[place : place + 1], times=3)
        assert [ids[0] for ids in alone] == [ids[place] for ids in together]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.0, 0.8, 20), (1.5, 1.0, 5)]
)
def test_shares_are_those_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    """20,000 seeds over 100 words: half the sum of differences stays under 0.025 by chance."""
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(1)) * 2
    processors = logits_processors(temperature, top_p, top_k)
    expected = processors(None, logits.clone()).softmax(-1)[0]
    rules = [Sampling(temperature, top_p, top_k, seed=seed) for seed in range(20_000)]
    (ids,) = choose(rules, logits.expand(len(rules), -1))
    found = torch.bincount(torch.tensor(ids), minlength=100) / len(ids)
    assert float((found - expected).abs().sum() / 2) < 0.03
    assert not bool((found[expected == 0] > 0).any())


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.75, 40), (0.9, 0)])
def test_next_to_no_temperature_is_greedy(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(3, WORDS, generator=torch.Generator().manual_seed(2)) * 30
    (ids,) = choose([Sampling(temperature, top_p, top_k)] * 3, logits)
    assert ids == logits.argmax(-1).tolist()


def test_penalties_count_what_the_answer_has() -> None:
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.0]])
    often = Sampling(0.0, frequency_penalty=0.4)
    once = Sampling(0.0, presence_penalty=0.7)
    assert [ids[0] for ids in choose([often], logits, 6)] == [0, 0, 1, 0, 1, 0]
    assert [ids[0] for ids in choose([once], logits, 4)] == [0, 1, 0, 0]


def test_logits_that_are_no_numbers_are_told() -> None:
    logits = torch.zeros(2, 8)
    logits[1, 3] = float("nan")
    chosen = Chooser([Draw(Sampling(0.0)), Draw(Sampling(1.0, 1.0, 0))], CPU).choose(logits)
    assert chosen.broken.tolist() == [False, True]
