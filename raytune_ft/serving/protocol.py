"""OpenAI's requests as types: what a chat or a plain completion may ask for.

Every field is bounded. Fields of OpenAI's that cannot change an answer here are ignored; those
that would change it and are not built are refused by name, as are unknown ones. The body's size
is limited before it gets here (`serving.intake`). `serving.answers` has what is answered.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raytune_ft.serving.refusal import RequestError, refusal

IGNORED = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "verbosity", "parallel_tool_calls",
    }
)  # fmt: skip
"""Fields without influence on the answer."""

NEITHER: dict[str, tuple[Any, ...]] = {"n": (None, 1), "logit_bias": (None, {})}
CHAT_ONLY: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
}
COMPLETION_ONLY: dict[str, tuple[Any, ...]] = {
    "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1),
}  # fmt: skip
"""Fields that would change the answer, with the values that ask for nothing."""

ADVICE = {
    "response_format": "ask for JSON in the messages and parse the answer's content",
    "functions": "use 'tools'",
    "function_call": "use 'tools'",
    "n": "send the request as often as you want answers",
    "best_of": "send the request as often as you want answers",
}
"""What to do instead, where leaving a field out is not all there is to say."""

MAX_MESSAGES = 400
MAX_CHARS = 1_000_000
MAX_TOKENS = 1_000_000
MAX_TOOLS = 128
SEED_BOUND = 2**63
NAME = r"^[A-Za-z0-9_-]{1,64}$"

Text = Annotated[str, Field(max_length=MAX_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Strict):
    """One part of a message's content; only text can be read."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Strict):
    """What an earlier answer called."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: Text
    """JSON, as the model wrote it."""


class ToolCall(_Strict):
    """A call in an earlier answer."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Strict):
    """One message; `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=100)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    reasoning_content: Text | None = None
    """Not OpenAI's: what an answer thought, as other servers call it and training's rows do."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    refusal: None = None
    """Clients send an answer back as they got it, this and the next two with it."""
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def problem(self) -> tuple[str, str] | None:
        """Return the field that does not go with the role, and why; None if all do."""
        answers = self.role == "assistant"
        for field in ("tool_calls", "reasoning_content"):
            if getattr(self, field) and not answers:
                return field, "only a message of role 'assistant' has it"
        if self.role == "tool" and self.tool_call_id is None:
            return "tool_call_id", "a message of role 'tool' names the call that it answers"
        if self.content is None and not (answers and self.tool_calls):
            return "content", "a text is missing"
        return None

    def plain(self) -> dict[str, Any]:
        """Return the message as the data stage knows it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            message |= {
                "tool_call_id": self.tool_call_id,
                **({"name": self.name} if self.name else {}),
            }
        return message


class ToolFunction(_Strict):
    """A function that the answer may call."""

    name: Annotated[str, Field(pattern=NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Taken, since OpenAI's helpers send it; arguments are the model's own, not held to it."""


class Tool(_Strict):
    """A tool in a request."""

    type: Literal["function"]
    function: ToolFunction

    def plain(self) -> dict[str, Any]:
        """Return the tool as the data stage knows it: without what was not said."""
        shown = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": self.type, "function": shown}


class StreamOptions(_Strict):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(_Strict):
    """What chats and plain texts have in common."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEITHER

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Not OpenAI's, but sent by clients of other servers; 0: all tokens."""
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-SEED_BOUND, lt=SEED_BOUND)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)] | Annotated[list[Stop], Field(max_length=4)] | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for key, neutral in cls.neutral.items():
            if not _is_one_of(fields.get(key), neutral):
                instead = ADVICE.get(key)
                advice = f"leave it out, and {instead}" if instead else "leave it out"
                raise RequestError(f"'{key}' is not supported by this endpoint; {advice}", key)
        return {k: v for k, v in fields.items() if k not in IGNORED and k not in cls.neutral}

    @model_validator(mode="after")
    def _options_of_streams_only(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' is only allowed when 'stream' is true", "stream_options"
            )
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of the answer that the request asks for at most."""
        return self.max_tokens

    @property
    def chances(self) -> int | None:
        """Most likely tokens whose log probabilities are asked for; None: none, no chosen one's."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Asked):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEITHER | CHAT_ONLY

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None

    @model_validator(mode="after")
    def _fields_that_fit(self) -> ChatRequest:
        for place, message in enumerate(self.messages):
            if found := message.problem():
                param = f"messages[{place}].{found[0]}"
                raise RequestError(f"invalid '{param}': {found[1]}", param)
        if self.messages[-1].role not in ("user", "tool"):
            raise RequestError("the last message must have role 'user' or 'tool'", "messages")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError(
                "'tool_choice' is 'auto' or 'none' here: an answer cannot be made to call a tool",
                "tool_choice",
            )
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise RequestError("two of the tools have the same name", "tools")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of the answer that the request asks for at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def chances(self) -> int | None:
        """Most likely tokens whose log probabilities are asked for; 0: the chosen one's alone."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that the answer may call."""
        return [] if self.tool_choice == "none" else [tool.plain() for tool in self.tools or []]


class CompletionRequest(Asked):
    """Body of POST /v1/completions: a text that the model goes on with."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEITHER | COMPLETION_ONLY

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> CompletionRequest:
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            raise RequestError(
                "'prompt' is one text, or a list of one: token ids and several texts are not "
                "taken; send a request for each text",
                "prompt",
            )
        if not 1 <= len(prompts[0]) <= MAX_CHARS:
            raise RequestError(f"'prompt' has 1 to {MAX_CHARS} characters", "prompt")
        return self

    @property
    def text(self) -> str:
        """What the model goes on with."""
        return str(self.prompt[0] if isinstance(self.prompt, list) else self.prompt)

    @property
    def chances(self) -> int | None:
        """Most likely tokens whose log probabilities are asked for; 0: the chosen one's alone."""
        return self.logprobs


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse_request(body: bytes) -> ChatRequest:
    """Parse a chat's body; RequestError names the first field that is wrong."""
    return _parsed(ChatRequest, body)


def parse_completion(body: bytes) -> CompletionRequest:
    """Parse a plain text's body; RequestError names the first field that is wrong."""
    return _parsed(CompletionRequest, body)


def _parsed(kind: type[Request], body: bytes) -> Request:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value asks for nothing; True is not 1, nor 0 False."""
    return json.dumps(value) in {json.dumps(one) for one in neutral}
