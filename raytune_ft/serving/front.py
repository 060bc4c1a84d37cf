"""What stands in Ray Serve's own HTTP process, in front of all replicas.

Ray calls `middlewares` there because RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. In: every
request and every answer. Out: requests without the headers by which a client could steer Serve,
and answers of OpenAI's form where Serve or nobody would have answered: above all an error event at
the end of a stream whose replica has died, which otherwise would only stop. While all places are
taken, what comes is refused here, so that an overload costs the replicas next to nothing.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_ft.serving.limits import LIMITED
from raytune_ft.serving.refusal import OVERLOADED_HEADER, error_body, overloaded
from raytune_ft.serving.sending import REQUEST_ID, send_json

logger = logging.getLogger(__name__)

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "raytune_ft.serving.front:middlewares"
PROXY_CHECK = "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"
PROXY_CHECK_S = 2
"""Serve starts a dead HTTP process again behind three checks, and checks each 10 s by itself."""
RETRY_AFTER_S = 1
STREAK, PAUSE_S = 2, 0.1
"""Refusals by replicas one after the other that begin a pause, and how long it is: shorter than
those that wait take to be answered, so that no place stays empty because of it."""
GONE = "the replica that had this request is gone; send it again"
HIDDEN = frozenset({"/-/routes"})
"""Serve's own route that lists applications, and asks for no key."""
STEERING = re.compile(
    rb"(?i)x-request-(timeout-seconds|disconnect-disabled)|x[-_]session[-_]id|"
    rb"serve[-_]multiplexed[-_]model[-_]id"
)
"""Headers that Serve obeys: no timeout, no end when the client leaves, this replica."""


def middlewares() -> list[Middleware]:
    """Return what Serve puts in front of its HTTP application."""
    return [Middleware(Front)]


class Front:
    """Keep Serve's own words from clients, and leave no answer open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._places = app, Places()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"] in HIDDEN:
            await send_json(send, 404, error_body("no such route", 404))
            return
        asks = scope["path"] in LIMITED and scope.get("method") == "POST"
        if asks and self._places.taken():
            error = overloaded("all places are taken; try again later")
            await send_json(send, error.status, error.body(), error.headers())
            return
        answer = Outgoing(send, self._places if asks else None)
        try:
            await self._app({**scope, "headers": cleaned(scope["headers"])}, receive, answer)
        except Exception:
            logger.exception("a request failed in front of the replicas")
        await answer.close()


class Places:
    """What the replicas' last answers tell of their places."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._streak, self._until = clock, 0, 0.0

    def taken(self) -> bool:
        """Whether a request would be refused anyway."""
        return self._clock() < self._until

    def note(self, *, full: bool) -> None:
        """Learn from an answer."""
        self._streak = self._streak + 1 if full else 0
        if self._streak >= STREAK:
            self._until = self._clock() + PAUSE_S


class Outgoing:
    """One answer on its way to the client."""

    def __init__(self, send: Send, places: Places | None = None) -> None:
        self._send, self._places = send, places
        self._started = self._ended = self._streams = False
        self._own: tuple[int, bytes] | None = None

    async def __call__(self, message: Message) -> None:
        """Pass a message on, unless it is Serve's own error."""
        if message["type"] == "http.response.start":
            headers = Headers(scope=message)
            kind = headers.get("content-type", "")
            if self._places is not None:
                self._places.note(full=OVERLOADED_HEADER in headers)
            if message["status"] >= 400 and not kind.startswith("application/json"):
                self._own = message["status"], b""
                return
            self._started, self._streams = True, kind.startswith("text/event-stream")
            message = {**message, "headers": _with_one_id(message["headers"])}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
            if self._own is not None:
                self._own = self._own[0], self._own[1] + message.get("body", b"")[:1000]
                return
        await self._send(message)

    async def close(self) -> None:
        """Say what is left to say when the application is done."""
        if self._own is not None:
            await send_json(self._send, *_in_openai_form(*self._own))
        elif not self._started:
            await send_json(self._send, *_refused(503, GONE))
        elif not self._ended and self._streams:
            event = json.dumps(error_body(GONE, 503))
            body = f"data: {event}\n\n".encode()
            await self._send({"type": "http.response.body", "body": body})


def cleaned(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a request's headers without those that steer Serve, and at most one plain id."""
    ids = [value for name, value in headers if name.lower() == b"x-request-id"]
    kept = [
        (name, value)
        for name, value in headers
        if not STEERING.fullmatch(name) and name.lower() != b"x-request-id"
    ]
    if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0].decode("latin-1")):
        kept.append((b"x-request-id", ids[0]))
    return kept


def _in_openai_form(status: int, text: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return Serve's own error in OpenAI's form; its queue's 503 is 429, as ours is."""
    if status == 404:
        return 404, error_body("no such route", 404), {}
    if b"backpressure" in text.lower():
        return _refused(429, "too many requests wait already; try again later")
    if status in (408, 429):
        return _refused(status, "the request was not answered in time; try again later")
    return _refused(503, "no replica could take the request; try again")


def _refused(status: int, message: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    return status, error_body(message, status), {"Retry-After": str(RETRY_AFTER_S)}


def _with_one_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Keep the first X-Request-Id: Serve adds its own behind ours."""
    seen, kept = False, []
    for name, value in headers:
        if name.lower() == b"x-request-id":
            if seen:
                continue
            seen = True
        kept.append((name, value))
    return kept
