"""OpenAI's answers: pieces of text, calls and log probabilities in, its JSON objects out.

One `ChatAnswer` or `TextAnswer` per request builds all of the request's objects, whole or in
chunks, which share an id and a time.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from raytune_ft.chat.model import Chance
from raytune_ft.serving.tool_calls import Call

LEAST_LOGPROB = -9999.0
"""What OpenAI says for a token that cannot come: JSON has no infinity."""


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again."""

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int = 0) -> Usage:
        """Build from the counts."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            cached_tokens=cached,
        )

    def shown(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        counts: dict[str, Any] = self.model_dump(exclude={"cached_tokens"})
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


@dataclass(frozen=True)
class Said:
    """An answer or a piece of it; what there is of it decides whether it is true."""

    text: str = ""
    calls: Sequence[Call] = ()
    thought: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.thought)


class Answer(ABC):
    """Builds the objects of one request."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole(self, said: Said, chances: Sequence[Chance] | None, finish: str) -> dict[str, Any]:
        """Return the choice of a whole answer; `chances` None: log probabilities unasked."""

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """Return the choice that a stream begins with, if there is one."""

    @abstractmethod
    def part(
        self, said: Said, chances: Sequence[Chance] | None, finish: str | None = None
    ) -> dict[str, Any]:
        """Return the choice of one chunk; `finish` is set on the last one only."""

    def body(self, choice: dict[str, Any], usage: Usage) -> dict[str, Any]:
        """Return the object of a whole answer."""
        return {
            **self._head,
            "object": self.whole_kind,
            "choices": [choice],
            "usage": usage.shown(),
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the object of a chunk."""
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk without choices that `include_usage` asks for."""
        return {
            **self._head,
            "object": self.chunk_kind,
            "choices": [],
            "usage": usage.shown(),
        }


class ChatAnswer(Answer):
    """Objects of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, said: Said, chances: Sequence[Chance] | None, finish: str) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.thought:
            message["reasoning_content"] = said.thought
        if said.calls:
            message["content"] = said.text or None
            message["tool_calls"] = [call.shown() for call in said.calls]
        return {
            "index": 0,
            "message": message,
            "logprobs": _chat_logprobs(chances),
            "finish_reason": finish,
        }

    def opening(self) -> dict[str, Any]:
        """Return the choice that names the role."""
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def part(
        self, said: Said, chances: Sequence[Chance] | None, finish: str | None = None
    ) -> dict[str, Any]:
        """Return the choice of one chunk; a call is told whole."""
        delta: dict[str, Any] = {"reasoning_content": said.thought} if said.thought else {}
        if said.text or (chances and not said.thought):
            delta["content"] = said.text
        if said.calls:
            delta["tool_calls"] = [{"index": call.index, **call.shown()} for call in said.calls]
        return self._delta(delta, chances, finish)

    def _delta(
        self, delta: dict[str, Any], chances: Sequence[Chance] | None, finish: str | None
    ) -> dict[str, Any]:
        shown = _chat_logprobs(chances) if chances else None
        return {"index": 0, "delta": delta, "logprobs": shown, "finish_reason": finish}


class TextAnswer(Answer):
    """Objects of /v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._offset = 0

    def whole(self, said: Said, chances: Sequence[Chance] | None, finish: str) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        return self._choice(said.text, chances, finish)

    def opening(self) -> None:
        """Return nothing: a text begins with its first piece."""

    def part(
        self, said: Said, chances: Sequence[Chance] | None, finish: str | None = None
    ) -> dict[str, Any]:
        """Return the choice of one chunk."""
        return self._choice(said.text, chances or None, finish)

    def _choice(
        self, text: str, chances: Sequence[Chance] | None, finish: str | None
    ) -> dict[str, Any]:
        shown = None if chances is None else self._logprobs(chances)
        return {"text": text, "index": 0, "logprobs": shown, "finish_reason": finish}

    def _logprobs(self, chances: Sequence[Chance]) -> dict[str, Any]:
        """Return the older object of log probabilities; offsets count tokens' own characters."""
        offsets = []
        for chance in chances:
            offsets.append(self._offset)
            self._offset += len(chance.text)
        return {
            "tokens": [chance.text for chance in chances],
            "token_logprobs": [_finite(chance.logprob) for chance in chances],
            "top_logprobs": [
                {text: _finite(logprob) for text, _, logprob in chance.top} for chance in chances
            ],
            "text_offset": offsets,
        }


def _chat_logprobs(chances: Sequence[Chance] | None) -> dict[str, Any] | None:
    if chances is None:
        return None
    content = [
        {
            **_token(chance.text, chance.bytes, chance.logprob),
            "top_logprobs": [_token(*one) for one in chance.top],
        }
        for chance in chances
    ]
    return {"content": content, "refusal": None}


def _token(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def model_list(names: Iterable[str], created: int) -> dict[str, Any]:
    """Return the body of GET /v1/models."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return one model of GET /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "raytune_ft"}
