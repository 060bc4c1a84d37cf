"""What is kept of a request: ids, one JSON line, Prometheus' counts; and what is not."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raytune_ft.chat import ChatModel
from raytune_ft.chat.model import Piece
from raytune_ft.errors import ServeError
from raytune_ft.serving.api import build_api
from raytune_ft.serving.engine import EmbeddedEngine
from raytune_ft.serving.engines.batched import BatchedEngine
from raytune_ft.serving.guard import GuardRules
from raytune_ft.serving.keys import ApiKey, hash_key
from raytune_ft.serving.metrics import Metrics, exposition
from raytune_ft.serving.options import ApiOptions
from raytune_ft.serving.record import Record
from tests.soak.local import served_locally

ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "canary-question"}],
    "max_tokens": 5,
}
KEYED = GuardRules(keys=(ApiKey(name="ada", sha256=hash_key("canary-key")),))
ADA = {"Authorization": "Bearer canary-key"}


def asked(engine: EmbeddedEngine, rules: GuardRules, options: ApiOptions, *requests: Any) -> Any:
    """Send requests one after the other to one application; return the responses."""

    async def session() -> list[httpx.Response]:
        app = build_api(engine, rules, options)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(session())


def chat(**fields: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/v1/chat/completions", {"json": {**ASK, **fields}, "headers": ADA}


@pytest.mark.parametrize("log_prompts", [False, True])
def test_one_line_per_request(engine: EmbeddedEngine, tmp_path: Path, log_prompts: bool) -> None:
    log = tmp_path / "access.jsonl"
    options = ApiOptions(access_log=str(log), log_prompts=log_prompts)
    responses = asked(
        engine,
        KEYED,
        options,
        chat(seed=1),
        chat(stream=True),
        chat(temperature=9),
        ("GET", "/v1/models", {}),
        ("GET", "/no/such/path?canary-question", {"headers": ADA}),
        ("GET", "/healthz", {}),
    )
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 401, 404]
    assert [line["key"] for line in lines] == ["ada", "ada", "ada", None, "ada"]
    assert [line["id"] for line in lines] == [r.headers["x-request-id"] for r in responses[:-1]]
    assert [line["route"] for line in lines][2:] == ["/v1/chat/completions", "other", "other"]
    whole, streamed = lines[:2]
    assert (whole["stream"], streamed["stream"]) == (False, True)
    for line in (whole, streamed):
        assert line["completion_tokens"] == 5
        assert line["prompt_tokens"] == responses[0].json()["usage"]["prompt_tokens"]
        assert 0 < line["first_token_seconds"] <= line["seconds"]
        assert (line["model"], line["finish"]) == ("tiny", "length")
    assert "canary-key" not in text
    assert ("canary-question" in text) == log_prompts
    if log_prompts:
        assert whole["messages"] == ASK["messages"]
        assert whole["answer"] == responses[0].json()["choices"][0]["message"]["content"]


def test_who_leaves_is_written_down(endless: ChatModel, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    engine = BatchedEngine(endless)
    with served_locally(engine, ApiOptions(access_log=str(log))) as url:
        for stream in (True, False):
            with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url) as client:
                body = {**ASK, "max_tokens": 480, "stream": stream}
                with client.stream(
                    "POST", "/v1/chat/completions", json=body, timeout=0.1
                ) as response:
                    next(response.iter_lines())
                    raise httpx.ReadTimeout("enough")
        until = time.monotonic() + 10
        while len(log.read_text().splitlines()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    engine.close()
    lines = {line["stream"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert (lines[True]["status"], lines[False]["status"]) == (200, 499)
    assert {line["error"] for line in lines.values()} == {"the client left"}
    assert all(line["completion_tokens"] < 480 for line in lines.values())


def test_a_log_that_cannot_be_written_is_one_line(engine: EmbeddedEngine, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"access_log .*: cannot be written"):
        build_api(engine, GuardRules(), ApiOptions(access_log=str(tmp_path / "no" / "log")))


def samples(text: str) -> dict[tuple[str, frozenset[Any]], float]:
    """Read an exposition as Prometheus' own parser does."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return sum(
        amount
        for (found, tags), amount in samples(text).items()
        if found == name and set(labels.items()) <= tags
    )


def test_prometheus_reads_what_happened(engine: EmbeddedEngine, tmp_path: Path) -> None:
    options = ApiOptions(access_log=str(tmp_path / "log"), replica="r1")
    wild = ("BREW", "/v1/models", {"headers": ADA})
    *_, response = asked(
        engine, KEYED, options, chat(), chat(stream=True), chat(n=2), wild,
        ("GET", "/metrics", {"headers": ADA}),
    )  # fmt: skip
    text = response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    route = "/v1/chat/completions"
    assert value(text, "raytune_requests_total", route=route, status="200", model="tiny") == 2
    assert value(text, "raytune_requests_total", route=route, status="400", model="") == 1
    assert value(text, "raytune_requests_total", method="OTHER", status="405") == 1
    assert value(text, "raytune_completion_tokens_total", model="tiny", replica="r1") == 10
    assert value(text, "raytune_first_token_seconds_count") == 2
    assert value(text, "raytune_between_tokens_seconds_count") == 8
    assert value(text, "raytune_requests_open") == 1  # the one that asks
    assert value(text, "raytune_slots") == engine.load().slots
    assert value(text, "raytune_ready") == 1
    kinds = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert kinds["raytune_prefix_cached_tokens"] == "counter"
    assert kinds["raytune_kv_used_ratio"] == "gauge"


def test_replicas_are_one_text(engine: EmbeddedEngine) -> None:
    replicas = []
    for name, count in (("a", 1), ('b"\n', 2)):
        metrics = Metrics(engine, name)
        for _ in range(count):
            metrics.begin()
            metrics.end(Record("id", "GET", route="/v1/models", status=200))
        replicas.append(metrics.families())
    text = exposition(replicas)
    assert text.count("# TYPE raytune_requests_total counter") == 1
    assert value(text, "raytune_requests_total", replica="a") == 1
    assert value(text, "raytune_requests_total", replica='b"\n') == 2


def test_the_metrics_of_all_replicas_are_gathered(engine: EmbeddedEngine) -> None:
    async def gather() -> Any:
        return [Metrics(engine, name).families() for name in ("a", "b")]

    async def read() -> str:
        app = build_api(engine, GuardRules(), gather=gather)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/metrics")).text

    assert value(asyncio.run(read()), "raytune_slots") == 2 * engine.load().slots


def test_times_of_pieces_with_several_tokens() -> None:
    record = Record("id", "POST")
    for n_tokens in (0, 2, 2, 5):
        record.take(Piece("x", n_tokens))
    record.take(Piece("", 5, "stop", n_cached=3))
    assert len(record.gaps) == 4  # between five tokens
    assert record.first is not None
    assert (record.completion_tokens, record.cached_tokens, record.finish) == (5, 3, "stop")
