"""Answers to many prompts at once: lists of ids in, new ids out, over one key-value cache.

Prompts are padded at the left and the padding is masked, so that each answer is the one that
`generate.stream_ids` gives to its prompt alone. A row that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from raytune_ft.model.decoding import Decoder, Graphs
from raytune_ft.model.generate import device_of, evaluating, logits_processors, room_for

ROWS_AT_ONCE = 16
"""Prompts of one batch: its cache is so many times that of a chat."""

Stopped = Literal["end", "length"]


@dataclass(frozen=True)
class Answer:
    """What was written behind one prompt."""

    ids: list[int]
    """Without the id that ended it."""
    stopped: Stopped
    """`length`: at `max_new_tokens` or the end of the model's context."""


@dataclass(frozen=True)
class Drawing:
    """How a token is chosen; `temperature` 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = Drawing()


@dataclass
class _Row:
    place: int
    """Of its prompt in the caller's list."""
    prompt: list[int]
    limit: int
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)


def answer_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    drawing: Drawing = GREEDY,
    seeds: Sequence[int | None] = (),
    ends: Callable[[Sequence[int]], bool] | None = None,
    after_token: Callable[[], None] | None = None,
    graphs: Graphs | None = None,
) -> list[Answer]:
    """Answer all prompts; torch's own random state and the model's modes stay as they are.

    Args:
        model: a causal language model, quantised or not, with or without an adapter.
        prompts: at least one id each.
        stop_ids: ids that end an answer.
        max_new_tokens: ids of an answer at most; the model's context may end it earlier.
        drawing: how tokens are chosen.
        seeds: one per prompt, of its own random state, where tokens are drawn; None takes the
            likeliest for this prompt all the same.
        ends: asked with an answer's ids after each; True ends it, the last id included.
        after_token: called once per forward pass, such as to say that this process is alive.
        graphs: of this model, which the caller keeps; none: made here and given back at the end,
            so that training has all of the memory.

    Raises:
        RecipeError: a prompt is empty or longer than the model's context.
    """
    rows = [
        _Row(place, list(prompt), min(max_new_tokens, room_for(model, len(prompt))), None)
        for place, prompt in enumerate(prompts)
    ]
    if drawing.temperature > 0.0:
        for row, seed in zip(rows, seeds, strict=True):
            if seed is not None:
                row.generator = torch.Generator(device_of(model)).manual_seed(seed)
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    asked = _Asked(_Chooser(drawing), frozenset(stop_ids), ends, after_token)
    lent = graphs or Graphs()
    answers: dict[int, Answer] = {}
    try:
        with evaluating(model):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = by_length[start : start + ROWS_AT_ONCE]
                answers.update(_answered(model, some, asked, lent))
    finally:
        if graphs is None:
            lent.close()
    return [answers[place] for place in range(len(rows))]


@dataclass(frozen=True)
class _Asked:
    """What `answer_all` was given, in so far as it concerns every batch."""

    choose: _Chooser
    stop_ids: frozenset[int]
    ends: Callable[[Sequence[int]], bool] | None
    after_token: Callable[[], None] | None


def _answered(
    model: nn.Module, rows: list[_Row], asked: _Asked, graphs: Graphs
) -> dict[int, Answer]:
    """Write the answers of one batch, by place in the caller's list."""
    room = max(row.limit for row in rows)
    batch = _Batch(rows, Decoder(model, [row.prompt for row in rows], room, graphs))
    answers: dict[int, Answer] = {}
    while batch.rows:
        answers.update(_advance(batch, asked))
        if asked.after_token is not None:
            asked.after_token()
    batch.decoder.close()
    return answers


def _advance(batch: _Batch, asked: _Asked) -> dict[int, Answer]:
    """Write one more id of each row; return the answers that have ended."""
    ended: dict[int, Answer] = {
        row.place: Answer([], "length") for row in batch.rows if not row.limit
    }
    if ended:
        batch.keep([i for i, row in enumerate(batch.rows) if row.limit])
        return ended
    chosen = asked.choose(batch)
    going = []
    for index, (row, id_) in enumerate(zip(batch.rows, chosen, strict=True)):
        if id_ not in asked.stop_ids:
            row.ids.append(id_)
        if id_ in asked.stop_ids or (asked.ends is not None and asked.ends(row.ids)):
            ended[row.place] = Answer(row.ids, "end")
        elif len(row.ids) == row.limit:
            ended[row.place] = Answer(row.ids, "length")
        else:
            going.append(index)
    batch.decoder.append(chosen)
    if ended:
        batch.keep(going)
    return ended


@dataclass
class _Batch:
    """Rows that are written side by side."""

    rows: list[_Row]
    decoder: Decoder

    def keep(self, places: list[int]) -> None:
        """Let all other rows go."""
        self.rows = [self.rows[place] for place in places]
        self.decoder.keep(places)


class _Chooser:
    """Choose an id for each row, by transformers' own processors of logits."""

    def __init__(self, drawing: Drawing) -> None:
        self.processors = logits_processors(drawing.temperature, drawing.top_p, drawing.top_k)

    def __call__(self, batch: _Batch) -> list[int]:
        scores = batch.decoder.logits()
        chosen: list[int] = scores.argmax(-1).tolist()
        drawn = [place for place, row in enumerate(batch.rows) if row.generator is not None]
        if drawn:
            shares = self.processors(None, scores[drawn]).softmax(-1)
            for place, share in zip(drawn, shares, strict=True):
                generator = batch.rows[place].generator
                chosen[place] = int(torch.multinomial(share, 1, generator=generator))
        return chosen
