"""The HTTP side over a real engine, in-process: answers, errors, limits, the page's headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from raytune_ft.chat import ChatModel, Sampling
from raytune_ft.data.encode import encode_conversation
from raytune_ft.data.segments import Conversation
from raytune_ft.serving.api import build_api
from raytune_ft.serving.engine import EmbeddedEngine
from raytune_ft.serving.guard import GuardRules
from raytune_ft.serving.intake import MAX_BODY_BYTES
from raytune_ft.serving.options import ApiOptions

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "red?"}],
    "max_tokens": 8,
    "seed": 1,
}
Use = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture
def call(engine: EmbeddedEngine) -> Callable[[Use], Any]:
    """Run a function with a client of the application."""

    def run(use: Use) -> Any:
        async def session() -> Any:
            transport = httpx.ASGITransport(
                app=build_api(engine, GuardRules()), raise_app_exceptions=False
            )
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await use(client)

        return asyncio.run(session())

    return run


@pytest.fixture
def ask(call: Callable[[Use], Any]) -> Callable[..., httpx.Response]:
    """Post one chat completion."""

    def post(**fields: Any) -> httpx.Response:
        return call(lambda client: client.post("/v1/chat/completions", json={**ASK, **fields}))

    return post


def chunks(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response) -> Any:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_a_whole_answer(ask: Callable[..., httpx.Response], engine: EmbeddedEngine) -> None:
    response = ask()
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["role"] == "assistant"
    n_prompt = len(engine.encode(ASK["messages"]))
    assert body["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 8,
        "total_tokens": n_prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_tells_the_same_in_pieces(ask: Callable[..., httpx.Response]) -> None:
    whole = ask().json()
    first, *deltas, last, usage = chunks(ask(stream=True, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in (first, *deltas, last, usage)}) == 1
    assert "usage" not in chunks(ask(stream=True))[-1]


@pytest.fixture
def submitted(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine is given: ids and sampling, request by request."""
    seen: list[Any] = []
    real = engine.submit

    def spy(prompt_ids: Any, sampling: Sampling, **options: Any) -> Any:
        seen.append((list(prompt_ids), sampling))
        return real(prompt_ids, sampling, **options)

    monkeypatch.setattr(engine, "submit", spy)
    return seen


def test_what_is_not_named_is_as_in_the_terminal(
    ask: Callable[..., httpx.Response], submitted: list[Any]
) -> None:
    ask()
    ask(
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        seed=-1,
        max_completion_tokens=2,
        stop=["x", "y"],
        frequency_penalty=0.5,
        presence_penalty=-1,
        logprobs=True,
        top_logprobs=2,
    )
    assert [sampling for _, sampling in submitted] == [
        Sampling(max_new_tokens=8, seed=1),
        Sampling(0.5, 0.5, 3, 2, 2**63 - 1, ("x", "y"), 0.5, -1.0, 2),
    ]


def test_served_prompt_ids_are_training_ids(
    ask: Callable[..., httpx.Response], submitted: list[Any], endless: ChatModel
) -> None:
    chat = [
        {"role": "system", "content": "Sei nett — 请."},
        {"role": "user", "content": "blue  river\n?"},
        {"role": "assistant", "content": "green song"},
        {"role": "user", "content": "🙂 and 你?"},
    ]
    parts = [*chat[:3], {"role": "user", "content": [{"type": "text", "text": "🙂 and 你?"}]}]
    ask(messages=chat)
    ask(messages=parts)
    seen = [ids for ids, _ in submitted]
    row = [*chat, {"role": "assistant", "content": "x"}]
    trained = encode_conversation(
        Conversation(row), endless.template, endless.tokenizer
    ).input_ids.tolist()
    assert len(seen[0]) > 20
    assert seen[0] == seen[1] == trained[: len(seen[0])]
    assert len(trained) - len(seen[0]) == len(endless.tokenizer.encode("x")) + 1


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"temperature": 3}, 400, "temperature", None),
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"max_tokens": 5000}, 400, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "red " * 600}]}, 400, "messages",
         "context_length_exceeded"),
    ],
)  # fmt: skip
def test_errors_have_openai_shape(
    ask: Callable[..., httpx.Response], fields: Any, status: int, param: str, code: str | None
) -> None:
    response = ask(**fields)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


def test_a_temperature_that_is_next_to_none_is_greedy(
    ask: Callable[..., httpx.Response],
) -> None:
    def said(temperature: float) -> str:
        return str(ask(temperature=temperature).json()["choices"][0]["message"]["content"])

    assert said(5e-324) == said(0)


def test_an_answer_that_takes_too_long_is_told(engine: EmbeddedEngine) -> None:
    options = ApiOptions(deadline_seconds=0.05, access_log="/dev/null")

    async def both() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=build_api(engine, GuardRules(), options))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {**ASK, "max_tokens": 400}
            return [
                await client.post("/v1/chat/completions", json={**body, "stream": stream})
                for stream in (False, True)
            ]

    whole, streamed = asyncio.run(both())
    assert whole.status_code == 408
    assert whole.headers["x-should-retry"] == "false"
    assert error_of(whole)["code"] == "deadline_exceeded"
    last = streamed.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_messages_that_the_template_refuses_are_unprocessable(
    endless: ChatModel,
) -> None:
    """XTuner's templates want turns: two questions in a row are none."""
    from dataclasses import replace

    from raytune_ft.data.templating.templates import get_template

    engine = EmbeddedEngine(replace(endless, template=get_template("zephyr", endless.tokenizer)))

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_api(engine, GuardRules()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {**ASK, "messages": ASK["messages"] * 2}
            return await client.post("/v1/chat/completions", json=body)

    response = asyncio.run(post())
    engine.close()
    assert response.status_code == 422
    assert "take turns" in error_of(response)["message"]


def test_bodies_are_limited_and_json(call: Callable[[Use], Any]) -> None:
    def post(content: Any, kind: str = "application/json") -> httpx.Response:
        return call(
            lambda client: client.post(
                "/v1/chat/completions", content=content, headers={"Content-Type": kind}
            )
        )

    assert post(b"{").status_code == 400
    assert post(b"{}", "text/plain").status_code == 415
    assert post(b" " * (MAX_BODY_BYTES + 1)).status_code == 413

    async def endless_body() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b" " * 100_000
        pytest.fail("the whole body was read")

    response = post(endless_body())
    assert response.status_code == 413
    error_of(response)


def test_overload_is_429_with_retry_after(
    call: Callable[[Use], Any], engine: EmbeddedEngine
) -> None:
    async def flood(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = {**ASK, "max_tokens": 100}
        return await asyncio.gather(
            *[client.post("/v1/chat/completions", json=body) for _ in range(8)]
        )

    responses = call(flood)
    busy = [r for r in responses if r.status_code == 429]
    assert {r.status_code for r in responses} == {200, 429}
    assert len(busy) == 8 - 3
    assert all(int(r.headers["retry-after"]) > 0 for r in busy)
    assert error_of(busy[0])["type"] == "rate_limit_error"
    # the engine's thread gives a place back behind the answer that it has sent
    until = time.monotonic() + 2
    while engine.in_use and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.in_use == 0


def test_a_closed_engine_is_503(call: Callable[[Use], Any], engine: EmbeddedEngine) -> None:
    engine.close()
    response = call(lambda client: client.post("/v1/chat/completions", json=ASK))
    assert response.status_code == 503
    assert error_of(response)["type"] == "server_error"
    assert call(lambda client: client.get("/healthz")).status_code == 503


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404),
     ("DELETE", "/v1/models", 405), ("GET", "/../pyproject.toml", 404),
     ("GET", "/%2e%2e/pyproject.toml", 404), ("GET", "/v1/models/other", 404)],
)  # fmt: skip
def test_other_routes_are_errors_of_the_same_shape(
    call: Callable[[Use], Any], method: str, path: str, status: int
) -> None:
    response = call(lambda client: client.request(method, path))
    assert response.status_code == status
    error_of(response)


def test_models(call: Callable[[Use], Any]) -> None:
    models = call(lambda client: client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["tiny"]
    assert call(lambda client: client.get("/v1/models/tiny")).json() == models["data"][0]


def test_the_page_runs_no_foreign_code(call: Callable[[Use], Any]) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/chat.js", "text/javascript"),
        ("/style.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ):
        response = call(lambda client, path=path: client.get(path))
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "innerHTML" not in response.text
        assert "http://" not in response.text.replace("http://www.w3.org", "")
        assert "https://" not in response.text


def test_another_host_name_is_refused(call: Callable[[Use], Any]) -> None:
    response = call(lambda client: client.get("/v1/models", headers={"Host": "evil.example"}))
    assert response.status_code == 403
    error_of(response)
