"""A model that answers: messages in, pieces of text out.

Messages become ids by `data.encode.encode_prompt`, the same function that training uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from raytune_ft.chat.history import Message, trim_turns
from raytune_ft.chat.source import ChatSource, find_source
from raytune_ft.chat.writing import Chance, Piece, Writing
from raytune_ft.data.encode import encode_prompt, encode_segments
from raytune_ft.data.segments import text_segments
from raytune_ft.data.templating.templates import Template, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.decoding import Graphs
from raytune_ft.model.generate import device_of, stream_ids
from raytune_ft.model.sampling import Chooser, Draw, Told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Cancelled", "Chance", "ChatModel", "Piece", "Sampling", "load_source", "open_chat"]

Cancelled = Callable[[], bool]

TAIL = 16
"""Tokens at a prompt's end in which an open thought shows."""
FALLBACK_CONTEXT = 2048
"""Tokens, for a config.json that states no max_position_embeddings."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the defaults are XTuner v0.1.9's but for the length."""

    temperature: float = 0.1
    """0 is greedy."""
    top_p: float = 0.75
    top_k: int = 40
    max_new_tokens: int = 512
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    """Taken off a token's logit each time that the answer has it already (OpenAI's meaning)."""
    presence_penalty: float = 0.0
    """Taken off once a token is in the answer."""
    logprobs: int | None = None
    """None: no `Piece.chances`; k: the k likeliest tokens beside each one chosen, 0 to 20."""


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with the tokenizer and template that it was trained with."""

    model: PreTrainedModel
    tokenizer: TextTokenizer
    template: Template
    name: str = "model"
    system: str = ""
    context: int = FALLBACK_CONTEXT
    """Tokens of prompt and answer together."""
    folder: str = ""
    """Where the base's files are."""
    graphs: Graphs = field(default_factory=Graphs, repr=False, compare=False)
    """What was captured for one answer serves the next."""

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Return the prompt's ids; conversations without a system text get the trained one.

        `tools` are what the answer may call, JSON schemas in OpenAI's form.
        """
        return encode_prompt(self.with_system(messages), self.template, self.tokenizer, tools)

    def thought(self, prompt_ids: Sequence[int]) -> bool | None:
        """Whether a prompt ends inside a thought; None: answers show no thoughts."""
        if not self.template.thinks or "</think>" in self.tokenizer.special_tokens:
            return None  # a special token is never shown
        return self.tokenizer.decode(prompt_ids[-TAIL:]).rstrip().endswith("<think>")

    def encode_text(self, text: str) -> list[int]:
        """Return a plain text's ids as pre-training has them: one BOS in front, no template."""
        segments = text_segments(text, self.tokenizer.bos_ids, self.tokenizer.eos_id)
        ids: list[int] = encode_segments(segments[:-1], self.tokenizer).input_ids.tolist()
        return ids

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with the system text of training in front, if they bring none."""
        given = list(messages)
        if self.system and not any(m["role"] == "system" for m in given):
            return [{"role": "system", "content": self.system}, *given]
        return given

    def trim(self, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
        """Drop the oldest turns so that an answer still fits into the context."""
        room = self.context - min(max_new_tokens, self.context // 2)
        return trim_turns(messages, lambda kept: len(self.encode(kept)), room)

    def pieces(
        self, prompt_ids: Sequence[int], sampling: Sampling, cancelled: Cancelled | None = None
    ) -> Iterator[Piece]:
        """Generate an answer to encoded messages; the last piece says why it ended.

        A cancelled answer ends without a last piece.
        """
        limit = min(sampling.max_new_tokens, self.context - len(prompt_ids))
        writing = Writing(self.tokenizer, sampling.stop)
        drawing = _Drawing(sampling, self.model)
        for token in self._ids(prompt_ids, drawing, limit, cancelled):
            piece = writing.push(token, drawing.told)
            yield piece
            if piece.finish is not None:
                return
        if cancelled is None or not cancelled():
            yield writing.end("length" if writing.n_tokens >= limit else "stop")

    def reply(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        max_new_tokens: int = Sampling.max_new_tokens,
        seed: int = Sampling.seed,
        cancelled: Cancelled | None = None,
    ) -> Iterator[str]:
        """Answer the last user message, piece by piece; whole characters only."""
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
        for piece in self.pieces(self.encode(messages), sampling, cancelled):
            if piece.text:
                yield piece.text

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.stop_ids | {self.tokenizer.eos_id}

    def _ids(
        self,
        prompt_ids: Sequence[int],
        drawing: _Drawing,
        limit: int,
        cancelled: Cancelled | None,
    ) -> Iterator[int]:
        if limit <= 0:
            return iter(())
        return stream_ids(
            self.model,
            list(prompt_ids),
            stop_ids=self.stop_ids,
            max_new_tokens=limit,
            cancelled=cancelled,
            graphs=self.graphs,
            choose=drawing,
        )


class _Drawing:
    """Chooses the ids of one answer as the engines of an endpoint do."""

    def __init__(self, sampling: Sampling, model: PreTrainedModel) -> None:
        self._chooser = Chooser([Draw(sampling)], device_of(model))
        self.told: Told | None = None

    def __call__(self, logits: torch.Tensor) -> int:
        """Return the next id for float32 `logits` (1, V)."""
        chosen = self._chooser.choose(logits)
        self.told = chosen.told.get(0)
        return int(chosen.ids)


def open_chat(
    path: str,
    bits: int | None = None,
    device: str | None = None,
    *,
    log: Callable[[str], None] = lambda _line: None,
) -> ChatModel:
    """Load a run folder, adapter, merged or plain model for chatting.

    Args:
        path: a folder, or `smollm2-135m-instruct`.
        bits: 4, 8, 16 or 32; none: the precision that training saw.
        device: `cpu`, `cuda`, `cuda:1`; none: the first GPU if there is one.
        log: gets a line before anything that takes long.

    Raises:
        CheckpointError, ModelError, RecipeError: one line that names the path.
    """
    return load_source(find_source(path, bits), device, log)


def load_source(
    source: ChatSource, device: str | None = None, log: Callable[[str], None] = lambda _line: None
) -> ChatModel:
    """Load what `find_source` found."""
    from raytune_ft.model.adapter import has_head, load_adapter
    from raytune_ft.model.fastpath.answering import quicken
    from raytune_ft.model.loading import load_model, prepare_folder

    folder = prepare_folder(source.base, log)
    tokenizer = TextTokenizer.from_folder(
        folder, source.section.eos_token, source.section.new_tokens
    )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    head_trained = source.adapter is not None and has_head(source.adapter)
    model: Any = load_model(folder, source.section, place, head_trained=head_trained)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter)
    model.eval()
    if place.type == "cuda" and (why := quicken(model)) is not None:
        log(f"one kernel for each of norms, rotary positions and MLPs is not used: {why}")
    return ChatModel(
        model=model,
        tokenizer=tokenizer,
        template=get_template(source.template, tokenizer),
        name=source.name,
        system=source.system,
        context=getattr(model.config, "max_position_embeddings", None) or FALLBACK_CONTEXT,
        folder=str(folder),
    )
