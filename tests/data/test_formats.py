"""Map functions: the reference's conversations, our one correction, and what wrong rows are told.

Formats of today and how they are recognised: test_formats_today.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.rows.formats import fill_text
from raytune_ft.data.rows.map_functions import MAP_FUNCTIONS
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError, RecipeError
from tests.data.conftest import GOLDEN, chat, read_row

FACTS: dict[str, Any] = json.loads((GOLDEN / "map_fns.json").read_text(encoding="utf-8"))
HEADING = "### Human: Plan a day### Assistant: Sure.\n### Morning\nWalk.\n### Evening\nRest."
CASES = [(name, example) for name, facts in FACTS.items() for example in facts["examples"]]


def as_messages(conversation: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Write the reference's turns as messages."""
    messages = []
    for turn in conversation:
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        if "input" in turn and name != "pretrain_map_fn":
            messages.append({"role": "user", "content": turn["input"]})
        messages.append({"role": "assistant", "content": turn["output"]})
    return messages


def read(row: dict[str, Any], name: str | None = None, **settings: Any) -> list[Message] | None:
    """Read a row into messages alone."""
    found = read_row(row, name, **settings)
    return None if found is None else list(found.messages)


def test_all_functions_of_the_reference_are_there() -> None:
    assert set(MAP_FUNCTIONS) == set(FACTS)
    for name, format_ in MAP_FUNCTIONS.items():
        assert list(format_.columns) == FACTS[name]["schema"]


@pytest.mark.parametrize(("name", "example"), CASES)
def test_compat_gives_every_conversation_of_the_reference(
    name: str, example: dict[str, Any]
) -> None:
    expected = as_messages(example["conversation"], name)
    assert read(example["row"], name, compat="xtuner-0.1.9") == (expected or None)


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, example in CASES if example["row"].get("text") != HEADING],
)
def test_ours_differs_in_nothing_but_headings(name: str, example: dict[str, Any]) -> None:
    expected = as_messages(example["conversation"], name)
    assert read(example["row"], name) == (expected or None)


def test_a_heading_stays_in_its_answer() -> None:
    whole = chat("Plan a day", "Sure.\n### Morning\nWalk.\n### Evening\nRest.")
    assert read({"text": HEADING}, "oasst1_map_fn") == whole
    assert read({"text": HEADING}, "oasst1") == whole
    for name in ("oasst1_map_fn", "oasst1", None):
        cut = read({"text": HEADING}, name, compat="xtuner-0.1.9")
        assert cut == chat("Plan a day", "Sure.")


@given(parts=st.lists(st.sampled_from(["Human: a", "Assistant: b", " Assistant:c", "x", ""])))
def test_compat_pairs_oasst_parts_by_position(parts: list[str]) -> None:
    """The reference's rule in one line: marked parts, two by two, whoever speaks."""
    spoken = [part.split(":")[1].strip() for part in parts if ":" in part]
    pairs = spoken[: len(spoken) // 2 * 2]
    found = read({"text": "###".join(parts)}, "oasst1_map_fn", compat="xtuner-0.1.9")
    assert [message["content"] for message in found or []] == pairs


def test_an_answer_to_a_system_text_alone_is_a_turn() -> None:
    loose = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    question = {"role": "user", "content": ""}
    expected = [loose[0], question, loose[1]]
    assert read({"messages": loose}, "openai_map_fn") == expected
    assert read({"messages": [loose[1], *loose]}, "openai_map_fn") == expected


def test_compat_keeps_rows_with_an_empty_answer() -> None:
    row = {"input": "a", "output": ""}
    assert read(row, "default_map_fn") is None
    assert read(row, "default_map_fn", compat="xtuner-0.1.9") == chat("a", "")


@pytest.mark.parametrize("name", MAP_FUNCTIONS)
def test_a_missing_column_is_named(name: str) -> None:
    for column in FACTS[name]["schema"]:
        row = dict(FACTS[name]["examples"][0]["row"])
        del row[column]
        row["other"] = 1
        expected = rf"^a\.jsonl:3: .*no column '{column}'; columns: .*other"
        with pytest.raises(DataError, match=expected):
            read(row, name, where="a.jsonl:3")


@pytest.mark.parametrize("name", MAP_FUNCTIONS)
@pytest.mark.parametrize("wrong", [3, {"a": 1}, True])
def test_a_value_of_the_wrong_kind_is_named(name: str, wrong: object) -> None:
    column = FACTS[name]["schema"][0]
    row = {**FACTS[name]["examples"][0]["row"], column: wrong}
    with pytest.raises(DataError, match=rf"^a\.jsonl:3: column '{column}' is (the|an) "):
        read(row, name, where="a.jsonl:3")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("Hi", "Hello", "Bye", "See you", system="Be kind.")},
        {
            "conversation": [
                {"system": "Be kind.", "input": "Hi", "output": "Hello"},
                {"input": "Bye", "output": "See you"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "user", "value": "Bye"},
                {"from": "assistant", "value": "See you"},
            ]
        },
    ],
)
def test_three_shapes_need_no_map_function(row: dict[str, Any]) -> None:
    assert read(row) == chat("Hi", "Hello", "Bye", "See you", system="Be kind.")


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"input": "", "output": "Long text."}]},
        {"messages": [{"role": "assistant", "content": "Long text."}]},
    ],
)
def test_text_to_pre_train_on_gets_no_system(row: dict[str, Any]) -> None:
    expected = [{"role": "assistant", "content": "Long text."}]
    assert read(row, system="You are kind.") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "is text, not a list of messages"),
        ({"messages": ["hi"]}, "item 1 is text, not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'; it has: role"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is null, not text"),
        ({"messages": chat("a")}, "ends with role 'user'"),
        ({"messages": chat("a", "b")[::-1]}, "message 1 has role 'assistant' where 'user' is due"),
        ({"messages": chat("a", "b") + chat("a")[:1] * 2}, "message 4 has role 'user'"),
        ({"messages": [*chat("a", "b"), *chat(system="s")]}, "message 3 has role 'system'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"conversation": [{"input": "a"}]}, "turn 1 has no 'output'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"abstract": "a", "title": "b"}, "no format fits the columns: abstract, title; they fit"),
        ({}, "no format fits the columns: none"),
        ({"messages": chat("a", "\ud800")}, "half a character"),
    ],
)
def test_wrong_rows_are_told_place_and_cause(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.jsonl:7: .*{message}") as caught:
        read(row, where="x.jsonl:7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": chat("a", " \n")}, {"conversation": []}]
)
def test_rows_without_an_answer_are_empty(row: dict[str, Any]) -> None:
    assert read(row) is None


def test_fill_replaces_only_its_own_keys() -> None:
    messages = chat("Who made {name}?", "{author} made {name}, {other} {}", system="{name}")
    row = {"messages": messages}
    got = read(row, fill={"name": "Ada", "author": "{name}'s team"})
    assert got == chat("Who made Ada?", "{name}'s team made Ada, {other} {}", system="Ada")


@given(text=st.text(max_size=30))
def test_fill_without_keys_changes_nothing(text: str) -> None:
    assert fill_text(text, {}) == text


def test_system_text_goes_to_rows_that_bring_none() -> None:
    row = {"messages": chat("a", "b")}
    assert read(row, system="I am {n}", fill={"n": "N"}) == chat("a", "b", system="I am N")
    row = {"messages": chat("a", "b", system="own")}
    assert read(row, system="other") == chat("a", "b", system="own")
    per_source = read({"messages": chat("a", "b")}, system="other", own_system="mine")
    assert per_source == chat("a", "b", system="mine")
    assert read({"messages": chat("a", "b")}, system="other", own_system="") == chat("a", "b")
    row = {"system_prompt": "", "question": "a", "response": "b"}
    assert read(row, "openorca_map_fn", system="s") == chat("a", "b", system="s")


def test_an_unknown_function_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'alpaca_map_fn'"):
        read({}, "alpacca_map_fn")


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "[1, 2", "(" * 5000, "3"])
def test_agent_rows_are_literals_and_never_run(text: str) -> None:
    with pytest.raises(DataError, match="column 'conversations' is"):
        read({"conversations": text}, "msagent_react_map_fn")
