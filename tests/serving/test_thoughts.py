"""What a model thinks reaches clients apart from what it says, however the pieces fall."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from raytune_ft.chat import ChatModel
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.serving.guard import GuardRules
from raytune_ft.serving.thoughts import ThoughtReader
from tests.data.chat_families import FOLDER
from tests.serving.browser import Scripted
from tests.soak.local import served

WHOLE = [
    # answer, whether the prompt opened the thought, said, thought
    ("<think>\nI sum.\n</think>\n\n4", False, "4", "I sum."),
    ("  <think>a < b</think>4 </think> 5", False, "4 </think> 5", "a < b"),
    ("I sum.\n\nYes.\n</think>\n\n4\n", True, "4\n", "I sum.\n\nYes."),
    ("<think>cut sho", False, "", "cut sho"),
    ("<think>cut sho </thi", False, "", "cut sho </thi"),
    ("<think></think>4", False, "4", ""),
    ("<thin", False, "<thin", ""),
    (" 4 and <think>no</think>", False, " 4 and <think>no</think>", ""),
    ("", False, "", ""),
    ("  \n", False, "  \n", ""),
]
answers = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "\n", " ", "a", "é", "think>", "<thi"]),
    max_size=12,
).map("".join)


def read(pieces: Sequence[str], *, reads: bool = True, opened: bool = False) -> tuple[str, str]:
    reader = ThoughtReader(reads=reads, opened=opened)
    told = [*[reader.push(piece) for piece in pieces], reader.flush()]
    return "".join(t.said for t in told), "".join(t.thought for t in told)


@pytest.mark.parametrize(("answer", "opened", "said", "thought"), WHOLE)
def test_an_answer_is_parted_at_its_marks(
    answer: str, opened: bool, said: str, thought: str
) -> None:
    assert read([answer], opened=opened) == (said, thought)
    assert read(list(answer), opened=opened) == (said, thought)


@given(answers, st.booleans(), st.data())
def test_pieces_change_nothing_and_no_word_is_lost(
    answer: str, opened: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=5)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    said, thought = read(pieces, opened=opened)
    assert (said, thought) == read([answer], opened=opened)
    kept = "".join((thought + said).split())
    marks = "".join(answer.split())
    if not opened and marks.startswith("<think>"):
        marks = marks.removeprefix("<think>")
        opened = True
    assert kept == (marks.replace("</think>", "", 1) if opened else marks)


def test_a_template_without_thoughts_leaves_all_as_it_is() -> None:
    answer = "<think>\nI sum.\n</think>\n\n4"
    assert read(list(answer), reads=False) == (answer, "")


@pytest.mark.parametrize(
    ("name", "opened"), [("r1", True), ("thinking", True), ("qwen3", False), ("chatml", None)]
)
def test_a_prompt_tells_whether_it_opens_a_thought(
    name: str, opened: bool | None, endless: ChatModel
) -> None:
    tokenizer = endless.tokenizer
    if name != "chatml":
        source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = TextTokenizer(dataclasses.replace(tokenizer.spec, chat_template=source))
    chat = dataclasses.replace(
        endless, tokenizer=tokenizer, template=get_template("tokenizer", tokenizer)
    )
    prompt = chat.encode([{"role": "user", "content": "<think>"}])
    assert chat.thought(prompt) is opened


class Thinking(Scripted):
    """A scripted engine whose template has words for thoughts and for tools."""

    opened = False

    def encode(self, messages: Any, *, model: Any = None, tools: Any = None) -> list[int]:
        return [0] * (1 + len(tools or ()))

    def thought(self, prompt_ids: Sequence[int], *, model: str | None = None) -> bool:
        return self.opened


@pytest.fixture(scope="module")
def engine() -> Thinking:
    return Thinking()


@pytest.fixture(scope="module")
def client(engine: Thinking) -> Iterator[OpenAI]:
    with served(engine, GuardRules()) as url:
        yield OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0, timeout=30)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]


def ask(client: OpenAI, *, tools: bool = False, stream: bool = False) -> Any:
    more: dict[str, Any] = {"tools": TOOLS} if tools else {}
    return client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "2+2?"}], stream=stream, **more
    )


@pytest.mark.parametrize("opened", [False, True])
def test_the_official_client_gets_both(engine: Thinking, client: OpenAI, opened: bool) -> None:
    engine.opened = opened
    engine.answer = ("" if opened else "<think>\n") + "I sum.\n</think>\n\n4"
    message = ask(client).choices[0].message
    assert (message.content, message.reasoning_content) == ("4", "I sum.")
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    assert "".join(d.content or "" for d in deltas) == "4"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "I sum."


def test_a_call_behind_a_thought_is_a_call(engine: Thinking, client: OpenAI) -> None:
    engine.opened = False
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    engine.answer = f"<think>\nI use {call[:11]}.\n</think>\n\n{call}"
    choice = ask(client, tools=True).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "add"
    assert choice.message.reasoning_content == f"I use {call[:11]}."
    assert choice.message.content is None


def test_an_answer_without_a_thought_has_no_such_field(engine: Thinking, client: OpenAI) -> None:
    engine.opened, engine.answer = False, "4"
    assert "reasoning_content" not in ask(client).choices[0].message.model_dump()
