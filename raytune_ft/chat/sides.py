"""Who answers: one model, or two whose answers to the same questions are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raytune_ft.chat.history import Message
from raytune_ft.chat.model import Cancelled, ChatModel, Piece, Sampling
from raytune_ft.errors import ModelError
from raytune_ft.model.decoding import Graphs

if TYPE_CHECKING:
    from peft import PeftModel

BASE = "base"
"""Word for a model without its adapter."""


@dataclass
class Side:
    """One of those who answer, with its own conversation."""

    label: str
    chat: ChatModel
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class WithoutAdapter(ChatModel):
    """The base of a model with an adapter: the same weights, asked with the adapter off."""

    def pieces(
        self, prompt_ids: Sequence[int], sampling: Sampling, cancelled: Cancelled | None = None
    ) -> Iterator[Piece]:
        """Generate; between two pieces the adapter is on again, for whoever shares the model."""
        pieces = super().pieces(prompt_ids, sampling, cancelled)
        while True:
            with _off(self.model):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def without_adapter(chat: ChatModel) -> ChatModel:
    """Return the base under `chat`; ModelError if it has no adapter of its own."""
    if not hasattr(chat.model, "disable_adapter"):
        raise ModelError(
            f"--compare {BASE}: {chat.name} has no adapter that could be taken off; "
            "name the model to compare with: --compare PATH"
        )
    own = {**vars(chat), "name": BASE, "graphs": Graphs()}
    return WithoutAdapter(**own)


@contextmanager
def _off(model: Any) -> Iterator[None]:
    adapted: PeftModel = model
    with adapted.disable_adapter():
        yield


def in_turn(streams: Sequence[Iterator[Piece]]) -> Iterator[tuple[int, Piece]]:
    """Take a piece of each stream in turn until all have ended: (which, piece)."""
    running = dict(enumerate(streams))
    while running:
        for number, stream in list(running.items()):
            piece = next(stream, None)
            if piece is None:
                del running[number]
            else:
                yield number, piece
