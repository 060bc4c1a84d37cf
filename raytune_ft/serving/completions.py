"""One answer from the request's bytes to the response: both completion routes.

In: HTTP requests. Out: OpenAI's objects, whole or as server-sent events. An answer that cannot be
finished says so: by its status, or by a last event where the status is out already.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from raytune_ft.chat.model import Chance, Piece, Sampling
from raytune_ft.errors import RaytuneError, ServeError
from raytune_ft.serving.answers import Answer, ChatAnswer, Said, TextAnswer, Usage
from raytune_ft.serving.engine import ChatEngine, EngineBusyError, PieceStream
from raytune_ft.serving.intake import read_body
from raytune_ft.serving.options import ApiOptions
from raytune_ft.serving.protocol import (
    SEED_BOUND,
    Asked,
    ChatRequest,
    parse_completion,
    parse_request,
)
from raytune_ft.serving.record import LEFT, Record, record_of
from raytune_ft.serving.refusal import RequestError, overloaded
from raytune_ft.serving.thoughts import Reading, ThoughtReader
from raytune_ft.serving.tool_calls import CallReader, Read

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 1024
"""Tokens of an answer, for chats that name no limit."""
DEFAULT_TEXT_LIMIT = 16
"""The same of /v1/completions, where OpenAI says so."""
LEAST_TEMPERATURE = 1e-4
"""Less is greedy: logits divided by it would no longer be numbers."""
FAILED = "the server failed to answer; see its log"
PROBE = {
    "type": "function",
    "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}},
}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Result = TypeVar("Result")


class Completions:
    """Answers chats and plain texts with one engine."""

    def __init__(self, engine: ChatEngine, options: ApiOptions) -> None:
        self._engine, self._options = engine, options
        self._in_intake = 0
        self._has_tools: dict[str, bool] = {}

    async def chat(self, http: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        record = record_of(http.scope)

        async def prepared() -> Reply:
            request = parse_request(await self._body(http))
            messages = [message.plain() for message in request.messages]
            record.texts["messages"] = messages
            names = [tool["function"]["name"] for tool in request.offered]
            ids = await self._encoded(request, lambda: self._encode(request, messages))
            opened = self._engine.thought(ids, model=request.model)
            thoughts = ThoughtReader(reads=opened is not None, opened=bool(opened))
            pieces = self._submit(request, ids, DEFAULT_LIMIT)
            reading = Reading(thoughts, CallReader(names))
            return self._reply(request, record, pieces, ChatAnswer(request.model), reading)

        return await self._respond(http, prepared)

    async def text(self, http: Request) -> Response:
        """Answer POST /v1/completions."""
        record = record_of(http.scope)

        async def prepared() -> Reply:
            request = parse_completion(await self._body(http))
            record.texts["prompt"] = request.text
            ids = await self._encoded(request, lambda: self._engine.encode_text(request.text))
            pieces = self._submit(request, ids, DEFAULT_TEXT_LIMIT)
            reading = Reading(ThoughtReader(reads=False), CallReader([]))
            return self._reply(request, record, pieces, TextAnswer(request.model), reading)

        return await self._respond(http, prepared)

    async def _respond(self, http: Request, prepared: Callable[[], Awaitable[Reply]]) -> Response:
        """Take a request in if there is room, and answer it whole or as a stream."""
        self._check_room()
        self._in_intake += 1
        try:
            reply = await prepared()
        finally:
            self._in_intake -= 1
        if reply.streamed:
            return StreamingResponse(
                reply.events(), media_type="text/event-stream", headers=STREAM_HEADERS
            )
        body = await unless_left(http, reply.whole())
        return Response(status_code=LEFT) if body is None else JSONResponse(body)

    async def _body(self, http: Request) -> bytes:
        return await read_body(http, self._options.body_seconds)

    def _check_room(self) -> None:
        """Refuse before the body is read or a template rendered: overload must cost little."""
        if not self._engine.healthy():
            raise RequestError("the endpoint is shutting down", status=503, retry_after_s=1)
        waiting = self._options.max_waiting
        if waiting is None:
            return
        load = self._engine.load()
        if load.running + load.waiting + self._in_intake >= load.slots + waiting:
            raise overloaded(f"{waiting} requests wait already; try again later")

    async def _encoded(self, request: Asked, encode: Callable[[], list[int]]) -> list[int]:
        """Return the prompt's ids, made in a thread: a long conversation takes a second."""
        check_model(self._engine, request.model)
        try:
            return await asyncio.to_thread(encode)
        except RaytuneError as error:
            raise told(error) from None

    def _encode(self, request: ChatRequest, messages: list[dict[str, Any]]) -> list[int]:
        tools = request.offered
        if tools and not self._takes_tools(request.model):
            raise RequestError(
                f"the chat template of '{request.model}' has no words for tools; leave 'tools' "
                "out, or serve a model whose template has them",
                "tools",
                status=422,
            )
        return self._engine.encode(messages, model=request.model, tools=tools or None)

    def _takes_tools(self, model: str) -> bool:
        """Whether the model's template writes tools at all; some leave them out without a word."""
        if model not in self._has_tools:
            ask = [{"role": "user", "content": "a"}]
            bare = self._engine.encode(ask, model=model)
            self._has_tools[model] = self._engine.encode(ask, model=model, tools=[PROBE]) != bare
        return self._has_tools[model]

    def _submit(self, request: Asked, ids: list[int], default_limit: int) -> Submitted:
        sampling = sampling_of(request, len(ids), self._engine.context, default_limit)
        try:
            pieces = self._engine.submit(ids, sampling, model=request.model)
        except RaytuneError as error:
            raise told(error) from None
        return Submitted(pieces, len(ids))

    def _reply(
        self,
        request: Asked,
        record: Record,
        submitted: Submitted,
        answer: Answer,
        reading: Reading,
    ) -> Reply:
        record.model, record.stream = request.model, bool(request.stream)
        record.prompt_tokens = submitted.n_prompt
        seconds = self._options.deadline_seconds - record.seconds
        return Reply(submitted.pieces, answer, reading, record, Wanted.by(request), seconds)


@dataclass(frozen=True)
class Submitted:
    """An answer that the engine has begun or will."""

    pieces: PieceStream
    n_prompt: int


@dataclass(frozen=True)
class Wanted:
    """How a request wants its answer told."""

    stream: bool
    usage: bool
    chances: bool

    @classmethod
    def by(cls, request: Asked) -> Wanted:
        """Read off a request."""
        return cls(bool(request.stream), request.wants_usage, request.chances is not None)


@dataclass(frozen=True)
class Part:
    """What one piece adds to an answer."""

    told: Read
    thought: str
    chances: tuple[Chance, ...]
    finish: str | None


class Reply:
    """One answer on its way out."""

    def __init__(
        self,
        pieces: PieceStream,
        answer: Answer,
        reading: Reading,
        record: Record,
        wanted: Wanted,
        seconds: float,
    ) -> None:
        self._pieces, self._answer, self._reading = pieces, answer, reading
        self._record, self._wanted = record, wanted
        self._ends = asyncio.get_running_loop().time() + seconds
        self.streamed = wanted.stream

    async def whole(self) -> dict[str, Any]:
        """Collect the answer; RequestError if it cannot be finished."""
        parts = [part async for part in self._parts()]
        text = "".join(part.told.text for part in parts)
        calls = [call for part in parts for call in part.told.calls]
        thought = "".join(part.thought for part in parts)
        chances = [chance for part in parts for chance in part.chances]
        self._record.texts["answer"] = text
        choice = self._answer.whole(
            Said(text, calls, thought),
            chances if self._wanted.chances else None,
            parts[-1].finish or "stop",
        )
        return self._answer.body(choice, self._usage())

    async def events(self) -> AsyncIterator[str]:
        """Yield the server-sent events of the answer; an error becomes the last event."""
        opening = self._answer.opening()
        text = ""
        async with aclosing(self._pieces):
            if opening is not None:
                yield _event(self._answer.chunk(opening))
            try:
                async for part in self._parts():
                    text += part.told.text
                    for choice in self._choices(part):
                        yield _event(self._answer.chunk(choice))
            except RequestError as error:
                self._record.error = error.message
                yield _event(error.body())
                return
            finally:
                self._record.texts["answer"] = text
            if self._wanted.usage:
                yield _event(self._answer.usage_chunk(self._usage()))
            yield "data: [DONE]\n\n"

    def _choices(self, part: Part) -> list[dict[str, Any]]:
        """Return the chunks of a part; the end of an answer has one of its own."""
        chances = part.chances if self._wanted.chances else ()
        choices = []
        said = Said(part.told.text, part.told.calls, part.thought)
        if said or chances:
            choices.append(self._answer.part(said, chances))
        if part.finish:
            choices.append(self._answer.part(Said(), None, part.finish))
        return choices

    async def _parts(self) -> AsyncIterator[Part]:
        """Yield the answer's parts, the last with its finish; RequestError where it breaks off."""
        async with aclosing(self._pieces):
            while True:
                piece = await self._next()
                self._record.take(piece)
                finish: str | None = piece.finish
                read, thought = self._reading.push(piece.text, final=finish is not None)
                if finish == "stop" and self._reading.found:
                    finish = "tool_calls"
                self._record.finish = finish
                yield Part(read, thought, piece.chances, finish)
                if finish is not None:
                    return

    async def _next(self) -> Piece:
        left = self._ends - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(self._pieces.__anext__(), max(left, 0.0))
        except asyncio.TimeoutError:
            raise RequestError(
                "the answer was not finished in time; ask for fewer tokens, or stream it",
                status=408,
                code="deadline_exceeded",
            ) from None
        except StopAsyncIteration:
            raise RequestError("the answer was broken off; try again", status=503) from None
        except RaytuneError as error:
            raise told(error) from None
        except Exception:  # of any library below; the client is told that, the log what
            logger.exception("an answer failed")
            raise RequestError(FAILED, status=500) from None

    def _usage(self) -> Usage:
        record = self._record
        return Usage.of(record.prompt_tokens, record.completion_tokens, record.cached_tokens)


def check_model(engine: ChatEngine, name: str) -> None:
    """Raise RequestError unless the engine serves a model of this name."""
    names = engine.models()
    if name not in names:
        shown = ", ".join(f"'{one}'" for one in names[:8]) + (", ..." if len(names) > 8 else "")
        raise RequestError(
            f"the model '{name}' does not exist; this endpoint serves {shown}",
            "model",
            status=404,
            code="model_not_found",
        )


def told(error: RaytuneError) -> RequestError:
    """Return what a client is told of an error of ours."""
    if isinstance(error, EngineBusyError):
        return overloaded(str(error))
    if isinstance(error, ServeError):
        return RequestError(str(error), status=503, retry_after_s=1)
    return RequestError(str(error), "messages", status=422)


def sampling_of(request: Asked, n_prompt: int, context: int, default_limit: int) -> Sampling:
    """Turn a request's fields into Sampling; what is not named is as in the terminal chat."""
    room, limit = context - n_prompt, request.limit
    if room < 1 or (limit is not None and limit > room):
        wanted = f"{n_prompt} in the prompt" + (f", {limit} in the answer" if limit else "")
        raise RequestError(
            f"the model's context is {context} tokens; asked for {wanted}; shorten them",
            "messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    seed = request.seed if request.seed is not None else random.SystemRandom().randrange(2**31)
    temperature = _or(request.temperature, Sampling.temperature)
    return Sampling(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=_or(request.top_p, Sampling.top_p),
        top_k=_or(request.top_k, Sampling.top_k),
        max_new_tokens=limit or min(room, default_limit),
        seed=seed % SEED_BOUND,
        stop=request.stops,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logprobs=request.chances,
    )


async def unless_left(http: Request, work: Any) -> Any:
    """Return what `work` gives, or None if the client leaves first, which ends it."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
