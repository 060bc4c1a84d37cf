"""The official client's whole chat surface against the real endpoint in Ray Serve."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving.conftest import Live

pytestmark = pytest.mark.ray
ASK: list[Any] = [{"role": "user", "content": "red river?"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models_are_listed_and_found(client: OpenAI, live: Live) -> None:
    assert [model.id for model in client.models.list()] == [live.model]
    assert client.models.retrieve(live.model).owned_by == "raytune_ft"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("../../etc/passwd")


def test_async_whole_and_stream(live: Live) -> None:
    async def both() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            options: Any = {"model": live.model, "messages": ASK, "max_tokens": 9, "seed": 3}
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            text = [c.choices[0].delta.content or "" async for c in stream]
            return whole.choices[0].message.content, "".join(text)

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_the_stream_helper_accumulates_the_answer(client: OpenAI, live: Live) -> None:
    options: Any = {"model": live.model, "messages": ASK, "max_tokens": 30, "seed": 3}
    said = client.chat.completions.create(**options, temperature=2).choices[0].message.content
    options |= {"temperature": 2, "stop": [str(said)[8:10]]}  # the helper refuses cut answers
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(
        **options, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage == whole.usage
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)


def test_raw_responses_have_ids_and_types(client: OpenAI, live: Live) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=live.model,
        messages=ASK,
        max_tokens=2,
        extra_headers={"X-Request-Id": "my-own-id"},
    )
    assert raw.headers["x-request-id"] == "my-own-id"
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().usage is not None
    other = client.chat.completions.with_raw_response.create(
        model=live.model, messages=ASK, max_tokens=2, extra_headers={"X-Request-Id": "a b"}
    )
    assert other.headers["x-request-id"] not in ("a b", "my-own-id")
    assert other.parse()._request_id == other.headers["x-request-id"]


def test_chances_of_a_chat(client: OpenAI, live: Live) -> None:
    options: Any = {"model": live.model, "messages": ASK, "max_tokens": 6, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert whole.usage is not None
    assert len(content) == whole.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob - 1e-5
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-5
        assert token.bytes is not None
    stream = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    told = [
        token.token
        for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert told == [token.token for token in content]
    unasked = client.chat.completions.create(**options)
    assert unasked.choices[0].logprobs is None


def test_plain_completions(client: OpenAI, live: Live) -> None:
    options: Any = {"model": live.model, "prompt": "red river", "seed": 3, "max_tokens": 9}
    whole = client.completions.create(**options, logprobs=2)
    choice = whole.choices[0]
    assert whole.object == "text_completion"
    assert whole.usage is not None
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == whole.usage.completion_tokens
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs or [])
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    default = client.completions.create(model=live.model, prompt="red", temperature=2, seed=1)
    assert default.usage is not None
    assert default.usage.completion_tokens <= 16


def test_penalties_and_seed_change_what_is_said(client: OpenAI, live: Live) -> None:
    def said(**fields: Any) -> str | None:
        options: Any = {"model": live.model, "messages": ASK, "max_tokens": 30, **fields}
        return client.chat.completions.create(**options).choices[0].message.content

    plain = said(temperature=0)
    assert said(temperature=0) == plain
    assert said(temperature=0, frequency_penalty=2.0) != plain
    assert said(temperature=0, presence_penalty=2.0) != plain


def test_each_error_is_the_clients_own_exception(client: OpenAI, live: Live) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=live.model, messages=ASK, n=2)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError, match="ask for JSON in the messages"):
        create(model=live.model, messages=ASK, response_format={"type": "json_object"})
    with pytest.raises(openai.UnprocessableEntityError, match="no words for tools"):
        create(model=live.model, messages=ASK, tools=[TOOL])
    with pytest.raises(openai.NotFoundError, match="run an embedding model") as missing:
        client.embeddings.create(model=live.model, input="x")
    assert missing.value.code == "unsupported_route"
    with pytest.raises(openai.NotFoundError, match="use POST /v1/chat/completions"):
        client.responses.create(model=live.model, input="x")
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.retrieve("chatcmpl-x")


def test_a_client_with_little_time_gives_up(client: OpenAI, live: Live) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.005).chat.completions.create(
            model=live.model, messages=ASK, max_tokens=400, temperature=2
        )


def test_unknown_parameters_are_named(client: OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match=r"unrecognized request argument.*min_p"):
        client.chat.completions.create(model=live.model, messages=ASK, extra_body={"min_p": 0.1})
