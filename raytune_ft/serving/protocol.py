"""OpenAI's chat completions as types: what a request may say, and what is answered.

Every field is bounded. Fields of OpenAI's that cannot change an answer here are ignored; those
that would change it and are not built are refused by name, as are unknown ones. The body's size
is limited before it gets here (`serving.app`).
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

IGNORED = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "verbosity", "parallel_tool_calls",
    }
)  # fmt: skip
"""Fields without influence on the answer."""

NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
}
"""Fields that would change the answer, with the values that ask for nothing."""

MAX_MESSAGES = 400
MAX_CHARS = 1_000_000
MAX_TOKENS = 1_000_000
SEED_BOUND = 2**63

Text = Annotated[str, Field(max_length=MAX_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Request):
    """One part of a message's content; only text can be read."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Request):
    """One message; `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as the data stage knows it."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": role, "content": text}


class StreamOptions(_Request):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Not OpenAI's, but sent by clients of other servers; 0: all tokens."""
    seed: Annotated[int, Field(ge=-SEED_BOUND, lt=SEED_BOUND)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)] | Annotated[list[Stop], Field(max_length=4)] | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for key, neutral in NOT_BUILT.items():
            if fields.get(key) not in neutral:
                raise RequestError(f"'{key}' is not supported by this endpoint; leave it out", key)
        return {k: v for k, v in fields.items() if k not in IGNORED and k not in NOT_BUILT}

    @model_validator(mode="after")
    def _fields_that_fit(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise RequestError("the last message must have role 'user'", "messages")
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' is only allowed when 'stream' is true", "stream_options"
            )
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of the answer that the request asks for at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class RequestError(Exception):
    """A request cannot be served; carries what OpenAI's error object holds.

    No ValueError, so that pydantic lets it through with its fields.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status
        self.code, self.retry_after_s = code, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return error_body(self.message, self.status, self.param, self.code)


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_request(body: bytes) -> ChatRequest:
    """Parse and check a request body; RequestError names the first field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _dotted(first["loc"])
    if first["type"] == "json_invalid":
        return RequestError(f"the body is no valid JSON: {first['msg']}")
    if first["type"] == "missing":
        return RequestError(f"missing required parameter: '{param}'", param)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unrecognized request argument supplied: {param}", param)
    return RequestError(f"invalid '{param}': {first['msg']}" if param else first["msg"], param)


def _dotted(location: tuple[int | str, ...]) -> str | None:
    """Return `messages[0].content` for a pydantic location, without the names of union arms."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "float", "int"):
            name += f".{part}" if name else part
    return name[:200] or None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        """Build from the two counts."""
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )


class Answer:
    """Builds the response objects of one request, which share an id and a time."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """Return a chat.completion."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage.model_dump(),
        }

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """Return a chat.completion.chunk with one delta."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk without choices that `include_usage` asks for."""
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage.model_dump(),
        }


def model_list(name: str, created: int) -> dict[str, Any]:
    """Return the body of GET /v1/models."""
    return {"object": "list", "data": [model_card(name, created)]}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return one model of GET /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "raytune_ft"}
