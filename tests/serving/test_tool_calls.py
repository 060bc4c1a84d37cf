"""Calls in an answer's text: each way of writing them, whole and in pieces of every size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.serving.tool_calls import Call, CallReader

TOOLS = ("weather", "time")
ARGUMENTS = '{"city": "Köln", "days": 3}'
FIRST, SECOND = ("weather", json.loads(ARGUMENTS)), ("time", {})
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
WRITTEN: list[tuple[str, str, list[Any]]] = [
    (HERMES, "", [FIRST]),
    (f"Let me see.\n{HERMES}", "Let me see.", [FIRST]),
    (f'{HERMES}\n<tool_call>{{"name": "time"}}</tool_call>\n', "", [FIRST, SECOND]),
    (f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>', "",
     [FIRST]),
    (f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}', "", [FIRST]),  # no end written
    (f'{{"name": "weather", "parameters": {ARGUMENTS}}}', "", [FIRST]),
    (f' {{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "time", "parameters": {{}}}}',
     "", [FIRST, SECOND]),
    (f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}', "", [FIRST]),
    (f'{{"type": "function", "function": {{"name": "weather", "arguments": {ARGUMENTS}}}}}', "",
     [FIRST]),
    (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time"}}]', "",
     [FIRST, SECOND]),
    (f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}", "", [FIRST, SECOND]),
    (f"[TOOL_CALLS]weather{ARGUMENTS}", "", [FIRST]),
    (f'[{{"name": "weather", "arguments": {ARGUMENTS}}}]', "", [FIRST]),
]  # fmt: skip
PLAIN = [
    "Nothing to call.",
    "",
    "  leading space",
    '{"name": "Ada", "age": 36}',
    '{"answer": 42}',
    "[1, 2, 3]",
    f'<tool_call>{{"name": "unknown", "arguments": {ARGUMENTS}}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"city": </tool_call> so what',
    "<tool_call>",
    "a < b <tool and [TOOL",
    "[TOOL_CALLS] none",
    '{"name": "weather", "parameters": [1]}',
    "{" * 3000,
]


def read(text: str, size: int, tools: tuple[str, ...] = TOOLS) -> tuple[str, list[Call]]:
    reader = CallReader(tools)
    parts = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(reader.flush())
    assert reader.found == sum(len(part.calls) for part in parts)
    return "".join(part.text for part in parts), [c for part in parts for c in part.calls]


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(("written", "text", "calls"), WRITTEN)
def test_calls_are_read(written: str, text: str, calls: list[Any], size: int) -> None:
    got, found = read(written, size)
    assert got.strip() == text
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert [call.index for call in found] == list(range(len(calls)))
    assert all(len(call.id) == 9 and call.id.isalnum() for call in found)


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert read(text, size) == (text, [])


def test_without_tools_a_call_is_text() -> None:
    assert read(HERMES, 5, ()) == (HERMES, [])


def test_text_that_cannot_be_a_call_passes_at_once() -> None:
    reader = CallReader(TOOLS)
    assert reader.push("The weather").text == "The weather"
    assert reader.push(" is <").text == " is "
    assert reader.push("fine>").text == "<fine>"
    assert CallReader(TOOLS).push('{"city').text == '{"city'


@given(
    text=st.text(alphabet='<>[]{}"/,:;tolcaTOLCASnmewhr_ \n', max_size=60),
    cuts=st.integers(1, 9),
)
def test_nothing_is_lost_whatever_is_said(text: str, cuts: int) -> None:
    got, calls = read(text, cuts)
    assert got == text or calls
