"""Tools from end to end: the official client offers them, a scripted engine calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import openai
import pytest
from openai import OpenAI

from raytune_ft.data.templating.templates import get_template
from raytune_ft.serving.engine import EmbeddedEngine
from raytune_ft.serving.guard import GuardRules
from tests.serving.browser import Scripted
from tests.soak.local import served

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "strict": True,
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class WithTools(Scripted):
    """A scripted engine whose template has words for tools."""

    def __init__(self) -> None:
        super().__init__()
        self.offered: list[Any] = []

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        self.offered.append(tools)
        return [*super().encode(messages, model=model), *[0] * len(tools or ())]


@pytest.fixture(scope="module")
def engine() -> WithTools:
    return WithTools()


@pytest.fixture(scope="module")
def client(engine: WithTools) -> Iterator[OpenAI]:
    with served(engine, GuardRules()) as url:
        yield OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=30)


ASK: list[Any] = [{"role": "user", "content": "Rain?"}]


def test_a_whole_answer_has_its_calls(client: OpenAI, engine: WithTools) -> None:
    engine.answer = f"I look.\n{CALL}"
    choice = client.chat.completions.create(
        model="scripted", messages=ASK, tools=TOOLS, tool_choice="auto"
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look.\n"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather", {"city": "Köln"},
    )  # fmt: skip
    shown = {k: v for k, v in TOOLS[0]["function"].items() if k != "strict"}
    assert engine.offered[-1] == [{"type": "function", "function": shown}]


def test_the_stream_helper_sees_the_same_call(client: OpenAI, engine: WithTools) -> None:
    engine.answer = f"{CALL}\n{CALL}"
    with client.chat.completions.stream(model="scripted", messages=ASK, tools=TOOLS) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert [event.index for event in done] == [0, 1]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    calls = choice.message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [{"city": "Köln"}] * 2
    assert len({call.id for call in calls}) == 2


def test_results_go_back_as_training_writes_them(client: OpenAI, engine: WithTools) -> None:
    engine.answer = CALL
    answer = client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS)
    message = answer.choices[0].message
    (call,) = message.tool_calls or []
    engine.answer = "It rains."
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answer = client.chat.completions.create(
        model="scripted", messages=[*ASK, message.model_dump(), result], tools=TOOLS
    )
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"
    said, told = engine.asked[-1][1:]
    assert said["tool_calls"][0]["function"]["name"] == "weather"
    assert told == {"role": "tool", "tool_call_id": call.id, "content": "rain"}


def test_without_being_offered_a_call_is_text(client: OpenAI, engine: WithTools) -> None:
    engine.answer = CALL
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat.completions.create(model="scripted", messages=ASK, **options).choices[
            0
        ]
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
        assert engine.offered[-1] is None


def test_templates_without_words_for_tools_refuse(endless: Any) -> None:
    """One template leaves tools out without a word, the other is none of the model's own."""
    from dataclasses import replace

    for template in ("tokenizer", "zephyr"):
        chat = replace(endless, template=get_template(template, endless.tokenizer))
        engine = EmbeddedEngine(chat)
        with served(engine, GuardRules()) as url:
            client = OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
            with pytest.raises(openai.UnprocessableEntityError, match="no words for tools"):
                client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
        engine.close()
