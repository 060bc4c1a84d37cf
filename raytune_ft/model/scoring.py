"""Scoring: sequences of ids in, the log-probability of each one's end out.

Sequences lie end to end in rows, apart from each other as packed samples are in training, so no
time goes into padding.

Shapes: L = tokens of a row, T = predicted tokens in it, V = words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytune_ft.config.estimates.footprint import LOGIT_ROWS
from raytune_ft.model.generate import device_of, evaluating
from raytune_ft.model.loss import Attention, causal_model, has_plain_head

ROW_TOKENS = 1024
"""Of a row: attention masks grow with its square, and more is no faster."""


@dataclass(frozen=True)
class Ending:
    """Ids of which the first `n_given`, at least 1, are given and the others are scored."""

    ids: tuple[int, ...]
    n_given: int


@dataclass(frozen=True)
class Score:
    """Of the scored ids together."""

    log_prob: float
    greedy: bool
    """Whether each is the likeliest behind those before it."""


def score(
    model: nn.Module,
    sequences: Sequence[Ending],
    row_tokens: int = ROW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score each sequence by itself.

    Args:
        model: a causal language model, quantised or not, with or without an adapter.
        sequences: none longer than the model's context and one more.
        row_tokens: tokens of a row, unless a single sequence has more.
        progress: called with (sequences done, sequences in all).
    """
    scores: dict[int, Score] = {}
    attention = Attention(causal_model(model).config.get_text_config())
    with evaluating(model):
        for places in _rows(sequences, row_tokens):
            row = [sequences[place] for place in places]
            scores.update(zip(places, _score_row(model, attention, row), strict=True))
            progress(len(scores), len(sequences))
    return [scores[place] for place in range(len(sequences))]


def _rows(sequences: Sequence[Ending], row_tokens: int) -> Iterator[list[int]]:
    """Fill rows with sequences, the longest first; yield their places."""
    by_length = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids))
    row: list[int] = []
    tokens = 0
    for place in by_length:
        length = len(sequences[place].ids) - 1
        if row and tokens + length > row_tokens:
            yield row
            row, tokens = [], 0
        row.append(place)
        tokens += length
    if row:
        yield row


def _score_row(model: nn.Module, attention: Attention, row: Sequence[Ending]) -> list[Score]:
    device = device_of(model)
    # the last id of a sequence is only predicted
    sizes = [len(sequence.ids) - 1 for sequence in row]
    fed = torch.tensor([[id_ for s in row for id_ in s.ids[:-1]]], device=device)
    following = torch.tensor([id_ for s in row for id_ in s.ids[1:]], device=device)
    positions = torch.cat([torch.arange(size) for size in sizes])[None].to(device)
    lengths = torch.tensor(sizes)
    segments = torch.repeat_interleave(torch.arange(len(row)), lengths)[None].to(device)
    scored = torch.cat([torch.arange(n) >= s.n_given - 1 for s, n in zip(row, sizes, strict=True)])
    at = scored.nonzero().flatten().to(device)  # (T,)
    inputs = {
        "input_ids": fed,
        "position_ids": positions,
        "attention_mask": attention.mask(segments),
        "use_cache": False,
    }
    log_probs, greedy = _predictions(model, inputs, at, following[at])
    owners = segments[0, at].tolist()
    sums, all_greedy = [0.0] * len(row), [True] * len(row)
    for owner, log_prob, likeliest in zip(owners, log_probs, greedy, strict=True):
        sums[owner] += log_prob
        all_greedy[owner] &= likeliest
    return [
        Score(log_prob, likeliest) for log_prob, likeliest in zip(sums, all_greedy, strict=True)
    ]


def _predictions(
    model: nn.Module, inputs: dict[str, Any], at: torch.Tensor, targets: torch.Tensor
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each target (T,), and whether it is the likeliest id."""
    log_probs: list[float] = []
    greedy: list[bool] = []
    for logits in _logits(model, inputs, at):
        wanted = targets[len(greedy) : len(greedy) + len(logits)]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = wide.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        log_probs += found.double().tolist()
        greedy += (wide.argmax(-1) == wanted).tolist()
    return log_probs, greedy


def _logits(model: nn.Module, inputs: dict[str, Any], at: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield logits of the places `at`, in their order: (LOGIT_ROWS, V) at a time where possible."""
    network = causal_model(model)
    if not has_plain_head(network.config.get_text_config()):
        yield network(**inputs, logits_to_keep=at).logits[0]
        return
    hidden = network.base_model(**inputs).last_hidden_state[0, at]
    head = network.get_output_embeddings()
    for start in range(0, len(at), LOGIT_ROWS):
        yield head(hidden[start : start + LOGIT_ROWS])
