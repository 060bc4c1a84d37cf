"""Who gets past the guard: names, origins, keys, addresses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raytune_ft.serving.guard import Guard, GuardRules, hash_key, host_name, is_loopback

LOCAL = GuardRules()
KEYED = GuardRules(frozenset({"chat.example"}), hash_key("s3cret"))


def status(
    rules: GuardRules,
    headers: dict[str, str],
    path: str = "/v1/models",
    client: str | None = "127.0.0.1",
) -> int:
    """Send one request through the guard; 200 stands for the application behind it."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the guard reads no body")

    scope = {
        "type": "http",
        "path": path,
        "client": (client, 1) if client else None,
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
    }
    asyncio.run(Guard(app, rules)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"]
)
def test_names_of_this_machine_pass(host: str) -> None:
    assert status(LOCAL, {"host": host}) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil@localhost", "", "::1",
     "localhost:x", "localhost/x", "0.0.0.0:8000", "[::1", "127.0.0.2"],
)  # fmt: skip
def test_rebound_names_are_refused(host: str) -> None:
    assert status(LOCAL, {"host": host}) == 403
    assert status(LOCAL, {"host": host}, path="/") == 403


def test_no_host_is_refused() -> None:
    assert status(LOCAL, {}) == 403


def test_other_sites_are_refused() -> None:
    assert status(LOCAL, {"host": "localhost", "origin": "http://localhost:8000"}) == 200
    for origin in ("https://evil.example", "null", ""):
        assert status(LOCAL, {"host": "localhost", "origin": origin}) == 403


def test_without_a_key_only_this_machine_is_answered() -> None:
    assert status(LOCAL, {"host": "localhost"}, client="192.168.1.5") == 403
    assert status(LOCAL, {"host": "localhost"}, client="::1") == 200
    assert status(KEYED, {"host": "chat.example"}, path="/", client="192.168.1.5") == 200


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [("Bearer s3cret", 200), ("bearer s3cret", 200), ("Bearer s3cre", 401), ("Bearer ", 401),
     ("s3cret", 401), ("Basic s3cret", 401), ("Bearer \xff", 401), (None, 401)],
)  # fmt: skip
def test_the_key_is_wanted(authorization: str | None, expected: int) -> None:
    headers = {"host": "localhost"} | ({"authorization": authorization} if authorization else {})
    assert status(KEYED, headers) == expected


def test_all_but_the_page_and_health_want_the_key() -> None:
    for path in ("/", "/chat.js", "/style.css", "/healthz"):
        assert status(KEYED, {"host": "localhost"}, path) == 200
    for path in ("/v1/chat/completions", "/V1/models", "//v1/models", "/metrics", "/docs"):
        assert status(KEYED, {"host": "localhost"}, path) == 401


def test_a_wildcard_address_takes_any_name_but_only_with_a_key() -> None:
    keyless = GuardRules(frozenset({"0.0.0.0"}))
    keyed = GuardRules(frozenset({"0.0.0.0"}), hash_key("k"))
    assert status(keyless, {"host": "any.example"}) == 403
    assert status(keyed, {"host": "any.example", "authorization": "Bearer k"}) == 200
    assert status(keyed, {"host": "a@b", "authorization": "Bearer k"}) == 403


def test_names_and_addresses() -> None:
    assert host_name("[::1]:80") == "::1"
    assert host_name("a:b:c") is None
    assert [is_loopback(h) for h in ("127.0.0.9", "::1", "localhost", "10.0.0.1", "x")] == [
        True,
        True,
        True,
        False,
        False,
    ]
