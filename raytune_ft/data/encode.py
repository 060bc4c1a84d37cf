"""Encoding: messages in, token ids and labels out. The only way from messages to ids.

Training, chat and serving call this module. Labels are IGNORE_INDEX where the loss must not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.data.segments import Conversation, Message, Segment
from raytune_ft.data.templating.templates import Template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One conversation as numbers; `input_ids` and `labels` are int32 of shape (n,)."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    uncut_length: int
    """Tokens before the cut at `max_length`; n if nothing was cut."""

    @property
    def n_targets(self) -> int:
        """Number of labelled tokens; 0 means that nothing can be learned."""
        return int((self.labels != IGNORE_INDEX).sum())


def encode_conversation(
    conversation: Conversation,
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
    compat: bool = False,
) -> Example:
    """Encode a conversation for training.

    The first label is always IGNORE_INDEX, since nothing before it could predict it.

    Args:
        conversation: ends with an answer, or is a lone assistant message (text).
        template: how turns are written; not asked where the row is written already.
        tokenizer: how text becomes ids.
        max_length: cut at the right after this many tokens; `uncut_length` tells what was lost.
        compat: give the ids and labels of XTuner v0.1.9: special tokens in a row's text count as
            such, and a first token may be a label.
    """
    segments = conversation.written
    if segments is None:
        segments = tuple(
            template.segments(
                conversation.messages,
                add_generation_prompt=False,
                tools=conversation.tools,
                loss=conversation.loss,
            )
        )
    ids: list[int] = []
    trained: list[bool] = []
    for segment in segments:
        piece = _ids(segment, tokenizer, ids[-1:], compat)
        ids.extend(piece)
        trained.extend([segment.trained] * len(piece))
    input_ids = np.asarray(ids[:max_length], dtype=np.int32)
    labels = np.where(np.asarray(trained[:max_length], dtype=bool), input_ids, IGNORE_INDEX)
    if not compat:
        labels[:1] = IGNORE_INDEX
    return Example(input_ids, labels.astype(np.int32), len(ids))


def encode_prompt(
    messages: Sequence[Message],
    template: Template,
    tokenizer: TextTokenizer,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Encode a conversation that the model is to continue with an answer.

    Args:
        messages: the conversation so far.
        template: how turns are written.
        tokenizer: how text becomes ids.
        tools: what the assistant may call, JSON schemas in OpenAI's form.
    """
    segments = template.segments(messages, add_generation_prompt=True, tools=tools)
    ids: list[int] = []
    for segment in segments:
        ids.extend(_ids(segment, tokenizer, ids[-1:]))
    return ids


def _ids(
    segment: Segment, tokenizer: TextTokenizer, before: Sequence[int], compat: bool = False
) -> Sequence[int]:
    """Encode a segment; `before` is the id in front of it, if any."""
    if segment.ids is not None:
        return segment.ids
    foreign = () if compat else segment.foreign
    # such a tokenizer puts the space behind a special token too, inside a text
    if segment.follows and _puts_space_first(tokenizer) and not _special(before, tokenizer):
        return _following(segment.text, foreign, tokenizer)
    return tokenizer.encode(segment.text, foreign)


def _following(
    text: str, foreign: Sequence[tuple[int, int]], tokenizer: TextTokenizer
) -> Sequence[int]:
    """Encode a text that goes on from another: behind a line break, which is then taken off."""
    line = tokenizer.encode("\n")
    shifted = [(start + 1, end + 1) for start, end in foreign]
    ids = tokenizer.encode("\n" + text, shifted)
    return ids[len(line) :] if ids[: len(line)] == line else tokenizer.encode(text, foreign)


def _special(ids: Sequence[int], tokenizer: TextTokenizer) -> bool:
    return bool(ids) and ids[0] in tokenizer.special_tokens.values()


@lru_cache(maxsize=8)
def _puts_space_first(tokenizer: TextTokenizer) -> bool:
    """Tell whether a text begins with a space that it has not got (Llama 2, Mistral 1)."""
    line = len(tokenizer.encode("\n"))
    return tokenizer.encode("\nx")[line:] != tokenizer.encode("x")
