"""Requests as OpenAI's clients send them, right and wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    parse_completion,
    parse_request,
)
from raytune_ft.serving.refusal import RequestError

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True},
}
CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": "{}"},
}


def parse(**fields: Any) -> ChatRequest:
    return parse_request(json.dumps({**ASK, **fields}).encode())


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value


def test_a_plain_request() -> None:
    request = parse()
    assert [m.plain() for m in request.messages] == ASK["messages"]
    assert (request.limit, request.stops, request.wants_usage) == (None, (), False)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    request = parse(
        messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    )
    assert [m.plain() for m in request.messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "你好"},
    ]


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ("", ()), ("a", ("a",)), (["a", "b"], ("a", "b"))]
)
def test_stop_is_a_string_or_a_list(stop: Any, stops: tuple[str, ...]) -> None:
    assert parse(stop=stop).stops == stops


def test_the_newer_name_of_the_limit_wins() -> None:
    assert parse(max_tokens=5, max_completion_tokens=7).limit == 7
    assert parse(max_tokens=5).limit == 5


def test_fields_without_influence_are_ignored() -> None:
    parse(user="u", store=True, metadata={"a": "b"}, n=1, logprobs=False, tools=[], top_p=None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": True}, "n"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{**TOOL, "type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
         "messages[0].reasoning_content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [ASK["messages"][0]] * 401}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "messages"),
        ({"messages": "hi"}, "messages"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)  # fmt: skip
def test_the_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith(param)
    body = error.body()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert "pydantic" not in body["message"]


def test_an_image_part_is_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    assert "messages[0].content" in str(
        refused(messages=[{"role": "user", "content": [part]}]).param
    )


def test_a_conversation_with_tools_is_what_training_has() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    result = {"role": "tool", "tool_call_id": "call00001", "content": "rain"}
    request = parse(
        messages=[{"role": "user", "content": "x", "name": "ada"}, answer, result],
        tools=[TOOL],
        parallel_tool_calls=True,
    )
    assert [m.plain() for m in request.messages] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "call00001"},
    ]
    function = {"name": "weather", "parameters": {"type": "object"}}
    assert request.offered == [{"type": "function", "function": function}]
    assert parse(tools=[TOOL], tool_choice="none").offered == []


def test_chances_are_asked_for_in_two_ways() -> None:
    assert [parse(logprobs=True).chances, parse().chances] == [0, None]
    assert parse(logprobs=True, top_logprobs=5).chances == 5
    assert text(logprobs=5).chances == 5
    assert [text(logprobs=0).chances, text().chances] == [0, None]


def text(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_plain_text(prompt: Any) -> None:
    request = text(prompt=prompt, echo=False, suffix=None, best_of=1, max_tokens=3)
    assert (request.text, request.limit) == ("hi", 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_plain_text_with_a_wrong_field_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        text(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 5000, b'{"model": "\\ud800"}', b"{}",
     b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":NaN}'],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_request(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(field=st.sampled_from([*ChatRequest.model_fields, "n", "functions", "x"]), value=JSON)
def test_any_value_is_taken_or_refused_by_name(field: str, value: Any) -> None:
    try:
        parse(**{field: value})
    except RequestError as error:
        assert error.status == 400
        json.dumps(error.body())
