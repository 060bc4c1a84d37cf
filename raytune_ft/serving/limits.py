"""What one API key may use: requests and tokens a minute, and requests at a time.

ASGI middleware behind the guard. Buckets fill evenly, up to a minute's worth; tokens are paid
when they are known, so a bucket may go below nothing and then has to fill up again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from raytune_ft.serving.guard import KEY_NAME
from raytune_ft.serving.keys import ApiKey
from raytune_ft.serving.record import record_of
from raytune_ft.serving.refusal import RequestError
from raytune_ft.serving.sending import send_json

MINUTE = 60.0
LIMITED = frozenset({"/v1/chat/completions", "/v1/completions"})

Clock = Callable[[], float]


@dataclass
class Bucket:
    """So much a minute, taken in any amounts."""

    per_minute: int
    clock: Clock = time.monotonic
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = float(self.per_minute), self.clock()

    def wait(self, amount: float) -> float:
        """Return the seconds until there is so much; 0 if there is now."""
        now = self.clock()
        rate = self.per_minute / MINUTE
        self.level = min(float(self.per_minute), self.level + (now - self.at) * rate)
        self.at = now
        return max(0.0, (amount - self.level) / rate)

    def take(self, amount: float) -> None:
        """Take so much, even if there is less."""
        self.level -= amount


class Account:
    """What one key has used."""

    def __init__(self, key: ApiKey, clock: Clock = time.monotonic) -> None:
        self._key, self._under_way = key, 0
        per_minute = key.requests_per_minute, key.tokens_per_minute
        self._requests, self._tokens = (Bucket(n, clock) if n else None for n in per_minute)

    def enter(self) -> None:
        """Count a request in; RequestError 429 if the key may not have it now."""
        key = self._key
        if key.concurrent and self._under_way >= key.concurrent:
            raise _over(f"{key.concurrent} requests at a time", 1.0)
        for bucket, what, amount in (
            (self._requests, "requests", 1),
            (self._tokens, "tokens", 1),
        ):
            if bucket and (seconds := bucket.wait(amount)):
                raise _over(f"{bucket.per_minute} {what} per minute", seconds)
        if self._requests:
            self._requests.take(1)
        self._under_way += 1

    def leave(self, tokens: int) -> None:
        """Count a request out with the tokens that it took."""
        self._under_way -= 1
        if self._tokens:
            self._tokens.take(tokens)


def _over(limit: str, seconds: float) -> RequestError:
    return RequestError(
        f"this API key may have {limit}; wait {math.ceil(seconds)} s",
        status=429,
        code="rate_limit_exceeded",
        retry_after_s=max(1, math.ceil(seconds)),
    )


class Limits:
    """Answer 429 to a key that has used what it may."""

    def __init__(
        self, app: ASGIApp, keys: tuple[ApiKey, ...], clock: Clock = time.monotonic
    ) -> None:
        self._app = app
        self._accounts = {key.name: Account(key, clock) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        account = self._accounts.get(scope.get(KEY_NAME, ""))
        if account is None or scope["path"] not in LIMITED or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            account.enter()
        except RequestError as error:
            await send_json(send, error.status, error.body(), error.headers())
            return
        try:
            await self._app(scope, receive, send)
        finally:
            record = record_of(scope)
            account.leave(record.prompt_tokens + record.completion_tokens)
