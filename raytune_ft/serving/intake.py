"""A request's body: read as JSON's media type, within a size and a time, before it is parsed."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from raytune_ft.serving.refusal import RequestError

MAX_BODY_BYTES = 1_000_000


async def read_body(http: Request, seconds: float) -> bytes:
    """Read the request's body, at most MAX_BODY_BYTES of it.

    Args:
        http: the request.
        seconds: how long a client may take to send it.

    Raises:
        RequestError: another media type, too much, too slow, or the client left in between.
    """
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("send the body as Content-Type: application/json", status=415)
    try:
        return await asyncio.wait_for(_limited(http), seconds)
    except asyncio.TimeoutError:
        raise RequestError(f"the body was not sent within {seconds:g} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client left before the body was whole", status=499) from None


async def _limited(http: Request) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body is over {MAX_BODY_BYTES} bytes", status=413)
    return bytes(body)
