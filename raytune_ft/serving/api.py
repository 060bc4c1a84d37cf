"""The HTTP side of the endpoint: FastAPI over a ChatEngine, without ray.

POST /v1/chat/completions, GET /v1/models, GET /healthz, and the chat page at `/`. All errors
have OpenAI's JSON shape. `serving.guard` decides who may come in.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from raytune_ft.chat.model import Piece, Sampling
from raytune_ft.errors import DataError, ServeError
from raytune_ft.serving.engine import ChatEngine, EngineBusyError, PieceStream
from raytune_ft.serving.guard import Guard, GuardRules
from raytune_ft.serving.page import page_files
from raytune_ft.serving.protocol import (
    SEED_BOUND,
    Answer,
    ChatRequest,
    RequestError,
    Usage,
    error_body,
    model_card,
    model_list,
    parse_request,
)

MAX_BODY_BYTES = 1_000_000
RETRY_AFTER_S = 2
DEFAULT_LIMIT = 1024
"""Tokens of an answer, for requests that name no limit."""

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def build_api(engine: ChatEngine, rules: GuardRules) -> FastAPI:
    """Build the ASGI application of one engine."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(api)
    _add_v1(api, engine)
    _add_page(api)
    api.add_middleware(Guard, rules=rules)
    return api


def _add_v1(api: FastAPI, engine: ChatEngine) -> None:
    created = int(time.time())

    @api.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await _complete(engine, request)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return model_list(engine.name, created)

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(engine, name)
        return model_card(name, created)

    @api.get("/healthz")
    async def health() -> Response:
        ready = engine.healthy()
        return JSONResponse({"status": "ok" if ready else "failed"}, 200 if ready else 503)


def _add_page(api: FastAPI) -> None:
    for name, (content, media_type) in page_files().items():
        paths = ("/", "/index.html") if name == "index.html" else (f"/{name}",)
        response = _static(content, media_type)
        for path in paths:
            api.add_api_route(path, response, methods=["GET", "HEAD"])


def _static(content: bytes, media_type: str) -> Any:
    async def respond() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return respond


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, error: Exception) -> Response:
        if not isinstance(error, RequestError):
            raise error
        wait = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
        return JSONResponse(error.body(), error.status, headers=wait)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            error_body(message, error.status_code), error.status_code, headers=error.headers
        )

    @api.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(error_body("the server failed to answer; see its log", 500), 500)


async def _complete(engine: ChatEngine, http: Request) -> Response:
    request = parse_request(await _body(http))
    _check_model(engine, request.model)
    # in a thread: a long conversation takes a second to render, others must not wait for it
    prompt_ids = await asyncio.to_thread(_encode, engine, request)
    sampling = _sampling(engine, request, len(prompt_ids))
    try:
        pieces = engine.submit(prompt_ids, sampling)
    except EngineBusyError as error:
        raise RequestError(
            str(error), status=429, code="rate_limit_exceeded", retry_after_s=RETRY_AFTER_S
        ) from None
    except ServeError as error:
        raise RequestError(str(error), status=503) from None
    answer = Answer(engine.name)
    if request.stream:
        events = _events(pieces, answer, len(prompt_ids), with_usage=request.wants_usage)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    return await _whole(http, pieces, answer, len(prompt_ids))


async def _body(http: Request) -> bytes:
    """Read the request's body, at most MAX_BODY_BYTES of it."""
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("send the body as Content-Type: application/json", status=415)
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body is over {MAX_BODY_BYTES} bytes", status=413)
    return bytes(body)


def _check_model(engine: ChatEngine, name: str) -> None:
    if name != engine.name:
        raise RequestError(
            f"the model '{name}' does not exist; this endpoint serves '{engine.name}'",
            "model",
            status=404,
            code="model_not_found",
        )


def _encode(engine: ChatEngine, request: ChatRequest) -> list[int]:
    try:
        return engine.encode([message.plain() for message in request.messages])
    except DataError as error:
        raise RequestError(str(error), "messages", status=422) from None


def _sampling(engine: ChatEngine, request: ChatRequest, n_prompt: int) -> Sampling:
    """Turn a request's fields into Sampling; what is not named is as in the terminal chat."""
    room, limit = engine.context - n_prompt, request.limit
    if room < 1 or (limit is not None and limit > room):
        wanted = f"{n_prompt} in the messages" + (f", {limit} in the answer" if limit else "")
        raise RequestError(
            f"the model's context is {engine.context} tokens; asked for {wanted}; shorten them",
            "messages",
            code="context_length_exceeded",
        )
    seed = request.seed if request.seed is not None else random.SystemRandom().randrange(2**31)
    return Sampling(
        temperature=_or(request.temperature, Sampling.temperature),
        top_p=_or(request.top_p, Sampling.top_p),
        top_k=_or(request.top_k, Sampling.top_k),
        max_new_tokens=limit or min(room, DEFAULT_LIMIT),
        seed=seed % SEED_BOUND,
        stop=request.stops,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


async def _whole(http: Request, pieces: PieceStream, answer: Answer, n_prompt: int) -> Response:
    """Collect an answer; a client that leaves ends the generation."""
    text, last = "", Piece("", 0)
    async with aclosing(pieces):
        async for last in pieces:
            text += last.text
            if await http.is_disconnected():
                return Response(status_code=499)
    return JSONResponse(
        answer.whole(text, last.finish or "stop", Usage.of(n_prompt, last.n_tokens))
    )


async def _events(
    pieces: PieceStream, answer: Answer, n_prompt: int, *, with_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer; an error becomes the last event."""
    last = Piece("", 0)
    async with aclosing(pieces):
        yield _event(answer.chunk({"role": "assistant", "content": ""}))
        try:
            async for last in pieces:
                if last.text:
                    yield _event(answer.chunk({"content": last.text}))
        except Exception:  # the status line is out: the stream itself must say it
            yield _event(error_body("the server failed in the middle of the answer", 500))
            return
        yield _event(answer.chunk({}, last.finish or "stop"))
        if with_usage:
            yield _event(answer.usage_chunk(Usage.of(n_prompt, last.n_tokens)))
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
