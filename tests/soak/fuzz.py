"""Requests of every shape (G14): from the schemas, valid or with something wrong, and plain bytes.

hypothesis draws them; the schemas are those of the running types, so a new field is fuzzed at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from raytune_ft.serving.protocol import Asked, ChatRequest, CompletionRequest
from tests.soak.wire import Got, Made

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]
PATHS = [
    "/", "/chat.js", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/tiny",
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/files", "/v1/responses",
    "/-/healthz", "/-/routes", "/..", "//", "/%00", "/%ff%fe", "/v1/models/%2e%2e%2fx",
    "/v1//models", "/v1/models/" + "a" * 3000, "/?" + "q" * 3000, "/v1/chat/completions/", "/é",
    "*", "http://x/y",
]  # fmt: skip
HEADERS = [
    b"Authorization", b"Origin", b"Content-Type", b"Content-Encoding", b"Transfer-Encoding",
    b"X-Request-Id", b"X-Request-Timeout-Seconds", b"X-Request-Disconnect-Disabled",
    b"X-Session-Id", b"serve_multiplexed_model_id", b"Accept", b"Expect", b"Upgrade", b"Range",
    b"Cookie", b"traceparent", b"X-Forwarded-For", b"Host",
]  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
WORDS = st.sampled_from(["red", "blue river", "你好", "🙂", "<|im_end|>", "\x00", "", " " * 40])


def of_schema(schema: dict[str, Any], defs: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy of the values that a JSON schema describes."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return st.deferred(lambda: of_schema(defs[name], defs))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([of_schema(one, defs) for one in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        return _object(schema, defs)
    if kind == "array":
        items = of_schema(schema.get("items", {}), defs)
        least = min(schema.get("minItems", 0), 3)
        return st.lists(items, min_size=least, max_size=min(schema.get("maxItems", 3), 3))
    bounds = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    simple: dict[Any, st.SearchStrategy[Any]] = {
        "boolean": st.booleans(),
        "null": st.none(),
        "integer": st.integers(bounds[0], bounds[1]),
        "number": st.floats(bounds[0], bounds[1], allow_nan=False),
        "string": st.from_regex(schema["pattern"]) if "pattern" in schema else WORDS,
    }
    return simple.get(kind, JSON)


def _object(schema: dict[str, Any], defs: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    needed = set(schema.get("required", ()))
    fields = {name: of_schema(one, defs) for name, one in schema["properties"].items()}
    return st.fixed_dictionaries(
        {name: one for name, one in fields.items() if name in needed},
        optional={name: one for name, one in fields.items() if name not in needed},
    )


@cache
def described(kind: type[Asked]) -> tuple[list[str], st.SearchStrategy[dict[str, Any]]]:
    """Return a request's fields and a strategy of valid ones."""
    schema = kind.model_json_schema()
    return list(schema["properties"]), of_schema(schema, schema.get("$defs", {}))


@st.composite
def bodies(draw: st.DrawFn, model: str) -> bytes:
    """Draw a body: as the schema says, with one thing changed, or anything."""
    kind = draw(st.sampled_from([ChatRequest, CompletionRequest]))
    names, valid = described(kind)
    fields = draw(valid)
    if draw(st.booleans()):  # many fields together are hardly ever right
        kept = {"model", "messages", "prompt", *draw(st.lists(st.sampled_from(names), max_size=2))}
        fields = {name: value for name, value in fields.items() if name in kept}
    fields |= {"model": model, "max_tokens": draw(st.integers(1, 3))}
    fields.pop("max_completion_tokens", None)
    if draw(st.booleans()):
        asked = {"role": "user", "content": draw(WORDS)}
        fields |= {"messages": [asked]} if kind is ChatRequest else {"prompt": draw(WORDS)}
    match draw(st.integers(0, 11)):
        case 0 | 1:
            name = draw(st.sampled_from([*names, "n", "tools", "unknown"]))
            fields[name] = draw(JSON)
        case 2:
            return draw(st.binary(max_size=60))
        case 3:
            whole = json.dumps(fields).encode()
            return whole[: draw(st.integers(0, len(whole)))]
        case 4:
            return b"[" * draw(st.integers(1, 3000)) + draw(st.binary(max_size=5))
    return json.dumps(fields).encode()


@st.composite
def requests(draw: st.DrawFn, model: str) -> Made:
    """Draw a request."""
    if draw(st.integers(0, 19)) == 0:
        return Made(raw=draw(raws()))
    likely = draw(st.integers(0, 9)) < 6
    method = "POST" if likely else draw(st.sampled_from(METHODS))
    posts = st.sampled_from(["/v1/chat/completions", "/v1/completions"])
    target = draw(posts if likely else st.sampled_from(PATHS))
    headers = [(b"Content-Type", b"application/json")] if draw(st.integers(0, 9)) else []
    value = st.binary(max_size=30).map(lambda b: b.translate(None, b"\r\n\x00"))
    if draw(st.booleans()):
        headers += draw(st.lists(st.tuples(st.sampled_from(HEADERS), value), max_size=2))
    body = draw(bodies(model)) if method in ("POST", "PUT", "PATCH") else b""
    return Made(method, quoted(target), tuple(headers), body)


@st.composite
def raws(draw: st.DrawFn) -> bytes:
    """Draw bytes that are hardly HTTP, or a request that stops in the middle."""
    whole = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 400\r\n\r\n" + b"x" * 400
    )
    at = draw(st.integers(0, len(whole)))
    strange = [
        draw(st.binary(max_size=200)),
        whole[:at],
        whole[:at] + draw(st.binary(max_size=9)) + whole[at:],
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        whole.replace(b"Content-Length: 400", b"Transfer-Encoding: chunked"),
        whole.replace(b"400", b"-1"),
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 3000 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    return draw(st.sampled_from(strange))


def quoted(target: str) -> str:
    """Keep a target on its line."""
    return target.replace(" ", "%20")


def fuzz(send: Callable[[Made], Got], n_requests: int, model: str) -> Counter[int]:
    """Send so many requests; return how often each status came.

    Raises:
        AssertionError: an answer is a 5xx, or an error of another shape than OpenAI's.
        TimeoutError: the server hangs.
    """
    seen: Counter[int] = Counter()

    @settings(
        max_examples=n_requests,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(request=requests(model))
    def one(request: Made) -> None:
        got = send(request)
        seen[got.status] += 1
        assert got.status < 500, (request, got)
        if got.status >= 400 and got.body and request.raw is None and _is_ours(got):
            error = json.loads(got.body)["error"]
            assert set(error) == {"message", "type", "param", "code"}, (request, got)

    one()
    return seen


def _is_ours(got: Got) -> bool:
    """Whether the application answered, and not the HTTP server, which refuses what is none."""
    return got.headers.get("content-type", "").startswith("application/json")
