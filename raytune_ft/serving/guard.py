"""Who may talk to the endpoint: ASGI middleware in front of every route.

A page in the user's browser can reach loopback addresses, by DNS rebinding even under its own
name. So the Host header must be a name of ours, and so must the Origin where one is sent.
Without a key, only this machine is answered. Methods that no route has are refused for all paths.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from raytune_ft.serving.keys import OWNER, ApiKey, find_key, hash_key
from raytune_ft.serving.page import MEDIA_TYPES
from raytune_ft.serving.refusal import error_body
from raytune_ft.serving.sending import send_json

__all__ = ["KEY_NAME", "OPEN_PATHS", "Guard", "GuardRules", "hash_key", "host_name", "is_loopback"]

KEY_NAME = "raytune_ft.key"
"""The scope's key of the name of the API key that a request came with."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104  (recognised, not bound)
METHODS = ("GET", "HEAD", "POST")

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", *(f"/{name}" for name in MEDIA_TYPES)})
"""Reached without the key: the page that asks for it, and the health checks."""


@dataclass(frozen=True)
class GuardRules:
    """What the guard lets through."""

    hosts: frozenset[str] = frozenset()
    """Host names beside localhost; a wildcard address stands for any, and needs a key."""
    key_hash: str | None = None
    """`hash_key` of the owner's key; without it and `keys`: no key, and this machine only."""
    keys: tuple[ApiKey, ...] = ()
    """Keys of others, with their limits."""
    origins: frozenset[str] = frozenset()
    """Other sites whose pages may ask (`https://chat.example`); `serving.api` adds CORS."""

    @cached_property
    def known(self) -> tuple[ApiKey, ...]:
        """All keys, the owner's among them."""
        owner = (ApiKey(name=OWNER, sha256=self.key_hash),) if self.key_hash else ()
        return (*owner, *self.keys)

    def knows_host(self, host: str | None) -> bool:
        """Whether a Host header names this endpoint."""
        if host is None:
            return False
        name = host_name(host)
        if self.known and self.hosts & WILDCARDS:
            return name is not None
        return name in LOOPBACK_NAMES or name in self.hosts

    def knows_origin(self, origin: str) -> bool:
        """Whether an Origin header names this endpoint or a site that may ask."""
        return origin in self.origins or self.knows_host(_netloc(origin))


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
    """Answer 401, 403 or 405 before a route is reached."""

    def __init__(self, app: ASGIApp, rules: GuardRules) -> None:
        self.app, self.rules = app, rules
        self._known = rules.known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request; one that passes with a key has the key's name in its scope."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        problem = self._problem(scope, Headers(scope=scope))
        if problem is None:
            await self.app(scope, receive, send)
            return
        status, message = problem
        extra = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": ", ".join(METHODS)}}
        await send_json(send, status, error_body(message, status), extra.get(status))

    def _problem(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if not self.rules.knows_host(headers.get("host")):
            return 403, "the Host header names no host of this endpoint; use localhost"
        origin = headers.get("origin")
        if origin is not None and not self.rules.knows_origin(origin):
            return 403, "the Origin header names another site; open the endpoint's own page"
        stranger = self._stranger(scope, headers)
        if stranger is not None:
            return stranger
        if scope.get("method", "GET") not in METHODS:
            return 405, f"{scope['method']} is not taken; use {', '.join(METHODS)}"
        return None

    def _stranger(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Return why a request may not come in, by its key or where it is from."""
        if not self._known:
            client = scope.get("client")
            if client and client[0] and not is_loopback(client[0]):
                return 403, "without RAYTUNE_API_KEY only this machine is answered"
            return None
        scheme, _, given = (headers.get("authorization") or "").partition(" ")
        key = find_key(self._known, given.strip())
        if key is not None and scheme.lower() == "bearer":
            scope[KEY_NAME] = key.name
        elif scope["path"] not in OPEN_PATHS:
            return 401, "missing or wrong API key; send Authorization: Bearer KEY"
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:  # `http://[`
        return None
