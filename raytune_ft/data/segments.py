"""Segments: the unit between templates and token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
"""`role` (system, user, assistant or tool) and `content`, a text. An answer may also have
`reasoning_content`, a text, and `tool_calls`, a list in OpenAI's form; a tool's message `name`
and `tool_call_id`."""

Loss = Literal["assistant", "last", "all"]
"""Which tokens are learned; as `data.sources[].loss`."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a conversation that is tokenised on its own."""

    text: str
    ids: tuple[int, ...] | None
    """Ids to take as they are, instead of tokenising `text`."""
    trained: bool
    """Whether the loss counts on these tokens."""
    foreign: tuple[tuple[int, int], ...] = ()
    """Character spans [start, end) of `text` that come from a row or a user, not from the
    template, ascending and apart; special tokens are never made out of them."""
    follows: bool = False
    """Whether the text goes on from the segment before it: no space is put before it, as some
    tokenizers do with every text."""


@dataclass(frozen=True)
class Conversation:
    """What a row of data is turned into: the only value between formats and encoding."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools that the assistant may call, JSON schemas in OpenAI's form."""
    loss: Loss = "assistant"
    written: tuple[Segment, ...] | None = None
    """Set for rows that carry their markers already (MOSS): no template is applied."""


def is_text(messages: Sequence[Message]) -> bool:
    """Tell whether this is pre-training text: a lone assistant message, and nothing but text."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        return False
    return not messages[0].get("tool_calls") and not messages[0].get("reasoning_content")


def whole(text: str) -> tuple[tuple[int, int], ...]:
    """Return the spans of a text that is foreign from end to end."""
    return ((0, len(text)),) if text else ()


def text_segments(text: str, bos_ids: tuple[int, ...], eos_id: int) -> list[Segment]:
    """Write pre-training text: bos, text, eos; all trained but bos."""
    start = [Segment("", bos_ids, trained=False)] if bos_ids else []
    return [
        *start,
        Segment(text, None, trained=True, foreign=whole(text)),
        Segment("", (eos_id,), trained=True),
    ]
