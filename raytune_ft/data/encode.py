"""Encoding: messages in, token ids and labels out. The only way from messages to ids.

Training, chat and serving call this module. Labels are IGNORE_INDEX where the loss must not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.data.segments import Conversation, Message, Segment
from raytune_ft.data.templating.templates import Template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer

IGNORE_INDEX = -100
NOTHING = np.zeros(0, np.int32)

Ids = Sequence[int] | npt.NDArray[np.int32]
Text = tuple[str, tuple[tuple[int, int], ...]]
"""A text and its foreign spans."""


@dataclass(frozen=True)
class Example:
    """One conversation, or a pair of them, as numbers; `input_ids`, `labels` int32 (n,)."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    uncut_length: int
    """Tokens before the cut at `max_length`; n if nothing was cut."""
    n_chosen: int = 0
    """Of a pair, tokens of the chosen conversation; those of the rejected one follow. 0: no
    pair."""

    @cached_property
    def n_targets(self) -> int:
        """Number of labelled tokens; 0 means that nothing can be learned."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def teaches(self) -> bool:
        """Whether there is a labelled token; in a pair one on either side."""
        labelled = self.labels != IGNORE_INDEX
        chosen, rejected = labelled[: self.n_chosen], labelled[self.n_chosen :]
        return bool(rejected.any()) and (not self.n_chosen or bool(chosen.any()))


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
    segments = written_segments(conversation, template)
    return encode_segments(segments, tokenizer, max_length, compat)


def written_segments(conversation: Conversation, template: Template) -> Sequence[Segment]:
    """Write a conversation down, by the template unless it is written already."""
    if conversation.written is not None:
        return conversation.written
    return template.segments(
        conversation.messages,
        add_generation_prompt=False,
        tools=conversation.tools,
        loss=conversation.loss,
    )


def encode_segments(
    segments: Sequence[Segment],
    tokenizer: TextTokenizer | Remembered,
    max_length: int | None = None,
    compat: bool = False,
) -> Example:
    """Encode what `written_segments` gives; arguments and result as in `encode_conversation`."""
    pieces: list[Ids] = []
    for segment in segments:
        pieces.append(_ids(segment, tokenizer, pieces, compat))
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    input_ids = np.concatenate([NOTHING, *(np.asarray(piece, np.int32) for piece in pieces)])
    trained = np.repeat(np.array([segment.trained for segment in segments], bool), sizes)
    labels = np.where(trained[:max_length], input_ids[:max_length], np.int32(IGNORE_INDEX))
    if not compat:
        labels[:1] = IGNORE_INDEX
    return Example(input_ids[:max_length], labels, len(input_ids))


def encode_pair(
    chosen: Sequence[Segment],
    rejected: Sequence[Segment],
    tokenizer: TextTokenizer | Remembered,
    max_length: int,
) -> Example:
    """Encode a pair of conversations as one example, the chosen one first.

    Args:
        chosen: what `written_segments` gives.
        rejected: the same.
        tokenizer: how text becomes ids.
        max_length: of both together. Either side is cut at the right at its half; what a shorter
            side leaves of its own, the other may take.
    """
    sides = [encode_segments(side, tokenizer) for side in (chosen, rejected)]
    total, half = sum(side.uncut_length for side in sides), max_length // 2
    rooms = [max(half, max_length - total + side.uncut_length) for side in sides]
    return Example(
        np.concatenate([side.input_ids[:n] for side, n in zip(sides, rooms, strict=True)]),
        np.concatenate([side.labels[:n] for side, n in zip(sides, rooms, strict=True)]),
        total,
        min(rooms[0], sides[0].uncut_length),
    )


class Remembered:
    """A tokenizer that has encoded many texts at once; it encodes the others one by one."""

    def __init__(self, tokenizer: TextTokenizer, texts: Iterable[Text]) -> None:
        """Encode texts, each once; raises as `TextTokenizer.encode_batch`."""
        wanted = list(dict.fromkeys(texts))
        self.tokenizer = tokenizer
        self.bos_ids, self.text_start_ids = tokenizer.bos_ids, tokenizer.text_start_ids
        self._known = dict(zip(wanted, tokenizer.encode_batch(wanted), strict=True))

    def encode(self, text: str, foreign: Sequence[tuple[int, int]] = ()) -> Ids:
        """Return the ids of a text, as `TextTokenizer.encode`."""
        known = self._known.get((text, tuple(foreign)))
        return self.tokenizer.encode(text, foreign) if known is None else known


def texts_to_encode(
    segments: Sequence[Segment], tokenizer: TextTokenizer, compat: bool = False
) -> Iterator[Text]:
    """Yield the texts that encoding these segments will most likely ask for."""
    spaced, behind = _puts_space_first(tokenizer), False
    for segment in segments:
        if segment.ids is None:
            foreign = () if compat else segment.foreign
            if segment.follows and behind:
                shifted = tuple((start + 1, end + 1) for start, end in foreign)
                yield "\n" + segment.text, shifted
            else:
                yield segment.text, foreign
        special = segment.ids is not None or not spaced
        behind = not special and not segment.text.endswith(tuple(tokenizer.special_tokens))


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
    ids: list[int] = encode_segments(segments, tokenizer).input_ids.tolist()
    return ids


def _ids(
    segment: Segment,
    tokenizer: TextTokenizer | Remembered,
    before: Sequence[Ids],
    compat: bool = False,
) -> Ids:
    """Encode a segment; `before` are the ids of those in front of it."""
    if segment.ids is not None:
        return segment.ids
    foreign = () if compat else segment.foreign
    # such a tokenizer puts the space behind a special token too, inside a text
    if segment.follows and not _keeps_its_space(before, tokenizer):
        return _following(segment.text, foreign, tokenizer)
    return tokenizer.encode(segment.text, foreign)


def _following(
    text: str, foreign: Sequence[tuple[int, int]], tokenizer: TextTokenizer | Remembered
) -> Ids:
    """Encode a text that goes on from another: behind a line break, which is then taken off."""
    line = list(tokenizer.encode("\n"))
    shifted = [(start + 1, end + 1) for start, end in foreign]
    ids = tokenizer.encode("\n" + text, shifted)
    whole = list(ids[: len(line)]) == line
    return ids[len(line) :] if whole else tokenizer.encode(text, foreign)


def _keeps_its_space(before: Sequence[Ids], tokenizer: TextTokenizer | Remembered) -> bool:
    """Tell whether nothing has to be done about a space: there is none, or a token's in front."""
    own = tokenizer.tokenizer if isinstance(tokenizer, Remembered) else tokenizer
    if not _puts_space_first(own):
        return True
    last = next((piece[-1] for piece in reversed(before) if len(piece)), None)
    return last in own.special_tokens.values()


@lru_cache(maxsize=8)
def _puts_space_first(tokenizer: TextTokenizer) -> bool:
    """Tell whether a text begins with a space that it has not got (Llama 2, Mistral 1)."""
    line = len(tokenizer.encode("\n"))
    return tokenizer.encode("\nx")[line:] != tokenizer.encode("x")
