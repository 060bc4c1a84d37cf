"""Who may talk to the endpoint: ASGI middleware in front of every route.

A page in the user's browser can reach loopback addresses, by DNS rebinding even under its own
name. So the Host header must be a name of ours, and so must the Origin where one is sent.
Without a key, only this machine is answered.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from raytune_ft.serving.page import MEDIA_TYPES
from raytune_ft.serving.protocol import error_body

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104  (recognised, not bound)

OPEN_PATHS = frozenset({"/", "/healthz", *(f"/{name}" for name in MEDIA_TYPES)})
"""Reached without the key: the page that asks for it, and the health check."""


@dataclass(frozen=True)
class GuardRules:
    """What the guard lets through."""

    hosts: frozenset[str] = frozenset()
    """Host names beside localhost; a wildcard address stands for any, and needs a key."""
    key_hash: str | None = None
    """`hash_key` of the key that all but OPEN_PATHS wants; none: no key, and this machine only."""

    def knows_host(self, host: str | None) -> bool:
        """Whether a Host header names this endpoint."""
        if host is None:
            return False
        name = host_name(host)
        if self.key_hash and self.hosts & WILDCARDS:
            return name is not None
        return name in LOOPBACK_NAMES or name in self.hosts

    def knows_key(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries the key; compared in constant time."""
        if self.key_hash is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        equal = hmac.compare_digest(hash_key(key.strip()), self.key_hash)
        return equal and scheme.lower() == "bearer"


def hash_key(key: str) -> str:
    """Return what is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def host_name(host: str) -> str | None:
    """Return the name in `name:port` or `[::1]:port`, lower case; None if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in host:
        return None
    return parts.hostname


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Answer 401 or 403 before a route is reached."""

    def __init__(self, app: ASGIApp, rules: GuardRules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem = self._problem(scope, Headers(scope=scope))
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await _refuse(send, *problem)

    def _problem(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if not self.rules.knows_host(headers.get("host")):
            return 403, "the Host header names no host of this endpoint; use localhost"
        origin = headers.get("origin")
        if origin is not None and not self.rules.knows_host(urlsplit(origin).netloc or None):
            return 403, "the Origin header names another site; open the endpoint's own page"
        if self.rules.key_hash is None:
            return _stranger(scope)
        if scope["path"] not in OPEN_PATHS and not self.rules.knows_key(
            headers.get("authorization")
        ):
            return 401, "missing or wrong API key; send Authorization: Bearer KEY"
        return None


def _stranger(scope: Scope) -> tuple[int, str] | None:
    client = scope.get("client")
    if client and client[0] and not is_loopback(client[0]):
        return 403, "without RAYTUNE_API_KEY only this machine is answered"
    return None


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
