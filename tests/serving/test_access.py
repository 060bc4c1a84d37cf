"""Who reaches what: every route and method of the running application, names, hostile templates."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI

from raytune_ft.chat import ChatModel
from raytune_ft.data.templating.templates import get_template
from raytune_ft.serving.api import build_api
from raytune_ft.serving.engine import EmbeddedEngine
from raytune_ft.serving.engines.batched import BatchedEngine
from raytune_ft.serving.guard import OPEN_PATHS, GuardRules
from raytune_ft.serving.keys import ApiKey, hash_key
from raytune_ft.serving.options import ApiOptions

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"]
UNKNOWN = [
    "/nothing",
    "/docs",
    "/openapi.json",
    "/-/routes",
    "/v1",
    "/v1/embeddings",
    "/v1/files/x",
]
KEYED = GuardRules(
    key_hash=hash_key("owner's"),
    keys=(
        ApiKey(name="ada", sha256=hash_key("ada's")),
        ApiKey(name="bob", sha256=hash_key("bob's"), requests_per_minute=2, concurrent=1),
    ),
)
LOG = ApiOptions(access_log="/dev/null")
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "red?"}],
    "max_tokens": 3,
}
Use = Callable[[httpx.AsyncClient], Awaitable[Any]]


def run(app: FastAPI, use: Use) -> Any:
    async def session() -> Any:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await use(client)

    return asyncio.run(session())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def paths_of(app: FastAPI) -> list[str]:
    """List the running application's paths, with a name where they have a place for one."""
    found = {re.sub(r"\{.*?\}", "tiny", route.path) for route in app.routes}  # type: ignore[attr-defined]
    assert "/v1/chat/completions" in found
    assert "/metrics" in found
    return sorted(found)


def test_nothing_but_page_and_health_is_reached_without_a_key(engine: EmbeddedEngine) -> None:
    app = build_api(engine, KEYED, LOG)

    async def walk(client: httpx.AsyncClient) -> list[tuple[str, str, int, int]]:
        seen = []
        for path in [*paths_of(app), *UNKNOWN]:
            for method in METHODS:
                bare = await client.request(method, path)
                wrong = await client.request(method, path, headers=bearer("bob"))
                seen.append((method, path, bare.status_code, wrong.status_code))
        return seen

    seen = run(app, walk)
    assert len(seen) >= 200
    open_ = {(path, bare) for _, path, bare, _ in seen if bare != 401}
    assert {path for path, _ in open_} == OPEN_PATHS | {"/index.html"}
    assert all(bare == wrong for _, path, bare, wrong in seen)
    reads = [(m, bare) for m, path, bare, _ in seen if path in OPEN_PATHS]
    assert {m for m, bare in reads if bare == 200} == {"GET", "HEAD"}
    assert {bare for m, bare in reads if m not in ("GET", "HEAD")} == {405}


def test_with_a_key_each_route_takes_its_own_methods(engine: EmbeddedEngine) -> None:
    app = build_api(engine, KEYED, LOG)

    async def walk(client: httpx.AsyncClient) -> dict[str, set[str]]:
        taken: dict[str, set[str]] = {}
        for path in paths_of(app):
            for method in METHODS:
                response = await client.request(method, path, headers=bearer("ada's"))
                assert response.status_code < 500
                if response.status_code != 405:
                    taken.setdefault(path, set()).add(method)
        return taken

    taken = run(app, walk)
    assert taken.pop("/v1/chat/completions") == {"POST"}
    assert taken.pop("/v1/completions") == {"POST"}
    assert all(methods <= {"GET", "HEAD"} for methods in taken.values())


def test_limits_are_each_keys_own(engine: EmbeddedEngine) -> None:
    async def ask(client: httpx.AsyncClient) -> list[tuple[int, str | None]]:
        answers = []
        for key in ("bob's", "bob's", "bob's", "ada's", "owner's", "bob's"):
            response = await client.post("/v1/chat/completions", json=ASK, headers=bearer(key))
            answers.append((response.status_code, response.headers.get("retry-after")))
        models = await client.get("/v1/models", headers=bearer("bob's"))
        return [*answers, (models.status_code, None)]

    answers = run(build_api(engine, KEYED, LOG), ask)
    assert [status for status, _ in answers] == [200, 200, 429, 200, 200, 429, 200]
    assert int(answers[2][1] or 0) in range(20, 31)


def test_a_keys_place_comes_back(engine: EmbeddedEngine) -> None:
    rules = GuardRules(keys=(ApiKey(name="one", sha256=hash_key("k"), concurrent=1),))

    async def ask(client: httpx.AsyncClient) -> list[int]:
        def post(**fields: Any) -> Any:
            body = {**ASK, **fields}
            return client.post("/v1/chat/completions", json=body, headers=bearer("k"))

        both = await asyncio.gather(post(max_tokens=40), post(max_tokens=40))
        after = await post(stream=True)
        return [*sorted(r.status_code for r in both), after.status_code]

    assert run(build_api(engine, rules, LOG), ask) == [200, 429, 200]


@pytest.mark.parametrize(("origin", "allowed"), [("https://a.example", True), ("https://b", False)])
def test_other_sites_only_where_they_are_named(
    engine: EmbeddedEngine, origin: str, allowed: bool
) -> None:
    rules = replace(KEYED, origins=frozenset({"https://a.example"}))
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }

    async def both(client: httpx.AsyncClient) -> list[httpx.Response]:
        path = "/v1/chat/completions"
        asked = await client.options(path, headers=preflight)
        sent = await client.post(path, json=ASK, headers={**bearer("ada's"), "Origin": origin})
        return [asked, sent]

    asked, sent = run(build_api(engine, rules, LOG), both)
    assert (asked.status_code == 200, sent.status_code == 200) == (allowed, allowed)
    assert ("access-control-allow-origin" in sent.headers) == allowed
    plain = run(build_api(engine, KEYED, LOG), both)
    assert [r.status_code for r in plain] == [403, 403]
    assert not any("access-control-allow-origin" in r.headers for r in plain)


NAMES = [
    "../secret", "..", ".", "", "/", "/etc/passwd", "good/../../secret", "good\x00", "..\\secret",
    "%2e%2e%2fsecret", "good%00", "link", "CON", "a" * 65, "-rf", "~", "~root", "good/adapter",
    "file:///etc/passwd", "http://127.0.0.1/x", "$(id)", "`id`", "good;id", "good\n", " good",
    "\u2024\u2024/secret", "．．/secret", "..%c0%af", "good/.", "./good", "secret",
]  # fmt: skip


def test_no_name_leads_outside_the_folder_of_adapters(endless: ChatModel, tmp_path: Path) -> None:
    """A link in the folder points outside; what Python opens meanwhile is written down."""
    root, secret = tmp_path / "adapters", tmp_path / "secret"
    root.mkdir()
    secret.mkdir()
    (secret / "adapter_config.json").write_text("{}")
    (root / "link").symlink_to(secret)
    engine = BatchedEngine(endless, adapters=str(root))
    names = [form for name in NAMES for form in (name, f"{name}/adapter", f"../{name}", f"/{name}")]
    opened: list[str] = []

    def noted(event: str, args: Any) -> None:
        if event == "open" and noting and "secret" in str(args[0]):
            opened.append(str(args[0]))

    async def ask(client: httpx.AsyncClient) -> list[int]:
        statuses = []
        for name in names:
            chat = await client.post("/v1/chat/completions", json={**ASK, "model": name})
            shown = quote(name, safe="/%").replace(".", "%2e")  # or the client resolves it
            got = await client.get(f"/v1/models/{shown}")
            statuses += [chat.status_code, got.status_code]
        return statuses

    noting = True
    sys.addaudithook(noted)
    statuses = run(build_api(engine, GuardRules(), LOG), ask)
    noting = False
    engine.close()
    assert len(statuses) >= 200
    assert set(statuses) <= {400, 404}
    assert opened == []


HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10**9 }}",
    "{{ 2 ** (10**9) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ raise_exception('no ' + messages[0]['content']) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_costs_its_request_and_no_other(endless: ChatModel, source: str) -> None:
    decent = endless.tokenizer.chat_template
    template = "{% if messages[0]['content'] == 'attack' %}" + source + "{% endif %}" + str(decent)
    tokenizer = endless.tokenizer.__class__(replace(endless.tokenizer.spec, chat_template=template))
    chat = replace(endless, tokenizer=tokenizer, template=get_template("tokenizer", tokenizer))
    engine = EmbeddedEngine(chat)

    async def ask(client: httpx.AsyncClient) -> list[int]:
        attack = {**ASK, "messages": [{"role": "user", "content": "attack"}]}
        start = time.monotonic()
        bad, good = await asyncio.gather(
            client.post("/v1/chat/completions", json=attack),
            client.post("/v1/chat/completions", json=ASK),
        )
        assert time.monotonic() - start < 30  # the sandbox's own limit is 2 s; others share the CPU
        assert "\n" not in bad.json()["error"]["message"]
        return [bad.status_code, good.status_code]

    assert run(build_api(engine, GuardRules(), LOG), ask) == [422, 200]
    engine.close()


def test_no_request_brings_a_template(engine: EmbeddedEngine) -> None:
    async def ask(client: httpx.AsyncClient) -> list[int]:
        return [
            (await client.post("/v1/chat/completions", json={**ASK, key: "{{ 1 }}"})).status_code
            for key in (
                "chat_template",
                "chat_template_kwargs",
                "template",
                "add_generation_prompt",
            )
        ]

    assert run(build_api(engine, GuardRules(), LOG), ask) == [400] * 4
