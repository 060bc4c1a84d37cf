"""What stands in front of Serve: streams that die, Serve's own errors, headers that steer it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from raytune_ft.serving.front import PAUSE_S, Front, Places, cleaned, middlewares


def answered(*messages: Any, path: str = "/", error: Exception | None = None) -> Any:
    """Send one request through the front to an application that says `messages`."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        if error:
            raise error

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "path": path, "headers": []}
    asyncio.run(Front(app)(scope, receive, send))
    status = sent[0]["status"]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    assert not sent[-1].get("more_body", False)
    return status, dict(sent[0]["headers"]), body


def start(status: int, kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, Any]:
    headers = [(b"content-type", kind), *more]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


@pytest.mark.parametrize("error", [None, RuntimeError("actor died")])
def test_a_stream_that_dies_ends_with_an_error(error: Exception | None) -> None:
    events = start(200, b"text/event-stream; charset=utf-8"), part(b"data: {}\n\n", more=True)
    status, _, body = answered(*events, error=error)
    first, last = body.decode().removesuffix("\n\n").split("\n\n")
    assert (status, first) == (200, "data: {}")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_whole_stream_stays_as_it_is() -> None:
    whole = start(200, b"text/event-stream"), part(b"data: [DONE]\n\n", more=True)
    _, _, body = answered(*whole, part(b"", more=False))
    assert body == b"data: [DONE]\n\n"


def test_an_answer_that_never_began_is_told_to_come_again() -> None:
    status, headers, body = answered()
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert "send it again" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (503, b"Request dropped due to backpressure (num_queued_requests=1)", 429),
        (503, b"Deployment is unavailable", 503),
        (500, b"Internal Server Error", 503),
        (408, b"Request x timed out", 408),
        (404, b"Path '/x' not found", 404),
    ],
)
def test_serves_own_errors_get_openais_form(status: int, text: bytes, expected: int) -> None:
    got, headers, body = answered(start(status, b"text/plain"), part(text, more=False))
    error = json.loads(body)["error"]
    assert (got, set(error)) == (expected, {"message", "type", "param", "code"})
    assert (b"retry-after" in headers) == (expected != 404)
    assert text.decode() not in error["message"]


def test_our_own_errors_pass() -> None:
    given = start(500, b"application/json"), part(b'{"error": {}}', more=False)
    assert answered(*given)[::2] == (500, b'{"error": {}}')


def test_the_list_of_applications_is_hidden() -> None:
    whole = start(200, b"application/json"), part(b"{}", more=False)
    assert answered(*whole, path="/-/routes")[0] == 404
    assert answered(*whole, path="/-/healthz")[0] == 200


def test_an_answer_has_one_id() -> None:
    double = (b"x-request-id", b"ours"), (b"X-Request-ID", b"serves")
    _, headers, _ = answered(start(200, b"a", *double), part(b"", more=False))
    assert [v for k, v in headers.items() if k.lower() == b"x-request-id"] == [b"ours"]


def test_headers_that_steer_serve_do_not_reach_it() -> None:
    steering = [
        b"x-request-timeout-seconds", b"X-Request-Disconnect-Disabled", b"x-session-id",
        b"X_Session_Id", b"serve_multiplexed_model_id", b"Serve-Multiplexed-Model-Id",
    ]  # fmt: skip
    kept = [(b"host", b"localhost"), (b"x-request-id", b"a-1")]
    assert cleaned([*kept, *((name, b"\xff") for name in steering)]) == kept
    for ids in ([b"a b"], [b"\xff"], [b"x" * 65], [b"a", b"b"]):
        assert cleaned([(b"x-request-id", value) for value in ids]) == []


def test_an_overload_is_refused_in_front_for_a_moment() -> None:
    """Two refusals by replicas, and the next requests do not reach them; other routes do."""
    reached: list[str] = []

    async def full(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send(start(429, b"application/json", (b"x-raytune-full", b"1")))
        await send(part(b"{}", more=False))

    front = Front(full)

    async def ask(path: str, method: str = "POST") -> tuple[int, bytes | None]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "path": path, "method": method, "headers": []}
        await front(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]).get(b"retry-after")

    async def all_of_them() -> list[tuple[int, bytes | None]]:
        chats = [await ask("/v1/chat/completions") for _ in range(5)]
        return [*chats, await ask("/v1/models", "GET")]

    by_replicas, in_front = (429, None), (429, b"2")
    answers = asyncio.run(all_of_them())
    assert answers == [*[by_replicas] * 2, *[in_front] * 3, by_replicas]
    assert reached == ["/v1/chat/completions"] * 2 + ["/v1/models"]


def test_places_are_asked_for_again_after_a_moment() -> None:
    now = [5.0]
    places = Places(lambda: now[0])
    places.note(full=True)
    places.note(full=False)
    places.note(full=True)
    assert not places.taken()
    places.note(full=True)
    assert places.taken()
    now[0] += PAUSE_S
    assert not places.taken()
    places.note(full=False)
    assert not places.taken()


def test_serve_finds_the_front_by_its_name() -> None:
    assert [one.cls for one in middlewares()] == [Front]
