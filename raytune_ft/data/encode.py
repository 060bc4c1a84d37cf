"""Encoding: messages in, token ids and labels out. The only way from messages to ids.

Training, chat and serving call this module. Labels are IGNORE_INDEX where the loss must not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_ft.data.segments import Message, Segment
from raytune_ft.data.templates import Template
from raytune_ft.data.tokenizer import TextTokenizer

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


def encode_chat(
    messages: Sequence[Message],
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int | None = None,
) -> Example:
    """Encode a conversation for training.

    The first label is always IGNORE_INDEX, since nothing before it could predict it.

    Args:
        messages: a conversation that ends with an answer, or a lone assistant message (text).
        template: how turns are written.
        tokenizer: how text becomes ids.
        max_length: cut at the right after this many tokens; `uncut_length` tells what was lost.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for segment in template.segments(messages, add_generation_prompt=False):
        piece = _ids(segment, tokenizer)
        ids.extend(piece)
        trained.extend([segment.trained] * len(piece))
    input_ids = np.asarray(ids[:max_length], dtype=np.int32)
    labels = np.where(np.asarray(trained[:max_length], dtype=bool), input_ids, IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return Example(input_ids, labels.astype(np.int32), len(ids))


def encode_prompt(
    messages: Sequence[Message], template: Template, tokenizer: TextTokenizer
) -> list[int]:
    """Encode a conversation that the model is to continue with an answer."""
    segments = template.segments(messages, add_generation_prompt=True)
    return [id_ for segment in segments for id_ in _ids(segment, tokenizer)]


def _ids(segment: Segment, tokenizer: TextTokenizer) -> Sequence[int]:
    return tokenizer.encode(segment.text) if segment.ids is None else segment.ids
