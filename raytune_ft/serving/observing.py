"""The outermost layer of the application: ids, times, one log line and counts per request.

ASGI middleware. In: any request. Out: the same, with a Record in its scope, `X-Request-Id` on its
answer, and an answer of ours where the layers below raise.
"""

from __future__ import annotations

import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_ft.serving.guard import KEY_NAME
from raytune_ft.serving.metrics import Metrics
from raytune_ft.serving.options import ApiOptions
from raytune_ft.serving.record import RECORD, Record, Write
from raytune_ft.serving.refusal import error_body
from raytune_ft.serving.sending import REQUEST_ID, send_json

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNWATCHED = frozenset({"/healthz", "/readyz"})
"""Asked every second by machines: counted, but not logged."""


class Observed:
    """Watch every request from its first byte to its last."""

    def __init__(self, app: ASGIApp, metrics: Metrics, options: ApiOptions, write: Write) -> None:
        self._app, self._metrics = app, metrics
        self._options, self._write = options, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        record = scope[RECORD] = Record(request_id(given), method)
        self._metrics.begin()
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            logger.exception("request %s failed", record.id)
            record.error = "failed"
            if not started:
                await send_json(sent, 500, error_body("the server failed; see its log", 500))
        finally:
            self._end(scope, record)

    def _end(self, scope: Scope, record: Record) -> None:
        """Count and log; without waiting for anything, since the client may have left."""
        record.key = scope.get(KEY_NAME)
        record.route = str(getattr(scope.get("route"), "path", "other"))
        if record.model and record.finish is None and not record.error:
            record.error = "the client left"
        self._metrics.end(record)
        if record.route in UNWATCHED:
            return
        try:
            self._write(record.line(with_texts=self._options.log_prompts))
        except OSError as error:  # a full disk must not take the endpoint down
            logger.error("the access log cannot be written: %s", error)


def request_id(given: str | None) -> str:
    """Return a client's own id if it is a plain name, else a new one."""
    return given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
