"""Segments: the unit between templates and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a conversation that is tokenised on its own."""

    text: str
    ids: tuple[int, ...] | None
    """Ids to take as they are, instead of tokenising `text`."""
    trained: bool
    """Whether the loss counts on these tokens."""


def is_text(messages: Sequence[Message]) -> bool:
    """Tell whether this is pre-training text: a lone assistant message."""
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def text_segments(text: str, bos_ids: tuple[int, ...], eos_id: int) -> list[Segment]:
    """Write pre-training text: bos, text, eos; all trained but bos."""
    start = [Segment("", bos_ids, trained=False)] if bos_ids else []
    return [*start, Segment(text, None, trained=True), Segment("", (eos_id,), trained=True)]
