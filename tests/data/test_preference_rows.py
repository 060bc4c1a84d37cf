"""Preference rows: the shapes that people have, what is recognised, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.rows.formats import to_conversation, to_pair
from raytune_ft.data.rows.recognition import recognise
from raytune_ft.data.segments import Conversation
from raytune_ft.errors import DataError
from tests.data.conftest import chat

CALLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def read(
    row: dict[str, Any], own_system: str | None = None, **data: Any
) -> tuple[Conversation, Conversation] | None:
    source = Source.model_validate({"path": "rows.jsonl", "system": own_system})
    section = DataSection.model_validate({"sources": [source], **data})
    return to_pair(row, source, section, "x.jsonl:7")


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def sharegpt(*texts: str) -> list[dict[str, str]]:
    senders = ("human", "gpt")
    return [{"from": senders[i % 2], "value": text} for i, text in enumerate(texts)]


SYSTEM = chat("Q", system="S")
SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "texts": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, chat("Q")),
    "TRL, messages": (
        {"prompt": SYSTEM, "chosen": [says("A")], "rejected": [says("B")]}, SYSTEM,
    ),
    "TRL, whole conversations": (
        {"chosen": chat("Q", "x", "R", "A"), "rejected": chat("Q", "x", "R", "B")},
        chat("Q", "x", "R"),
    ),
    "UltraFeedback, binarized": (
        {"prompt": "Q", "prompt_id": "1", "chosen": chat("Q", "A"), "rejected": chat("Q", "B"),
         "messages": chat("Q", "A"), "score_chosen": 8.0, "score_rejected": 2.0},
        chat("Q"),
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "Q", "input": "more", "chosen": "A", "rejected": "B", "system": "S",
         "history": [["q", "a"]]},
        chat("q", "a", "Q\nmore", system="S"),
    ),
    "LLaMA-Factory, sharegpt": (
        {"conversations": sharegpt("Q"), "chosen": {"from": "gpt", "value": "A"},
         "rejected": {"from": "gpt", "value": "B"}},
        chat("Q"),
    ),
    "Axolotl, chat_template": (
        {"messages": chat("Q"), "chosen": says("A"), "rejected": says("B")}, chat("Q"),
    ),
    "Axolotl, chatml.intel": (
        {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}, SYSTEM,
    ),
    "Axolotl, chatml.argilla": (
        {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}, chat("Q"),
    ),
    "messages and texts": ({"messages": SYSTEM, "chosen": "A", "rejected": "B"}, SYSTEM),
    "ms-swift": ({"messages": chat("Q", "A"), "rejected_response": "B"}, chat("Q")),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: x\n\nHuman: R\n\nAssistant: A",
         "rejected": "\n\nHuman: Q\n\nAssistant: x\n\nHuman: R\n\nAssistant: B"},
        chat("Q", "x", "R"),
    ),
    "one whole, one alone": ({"chosen": chat("Q", "A"), "rejected": "B"}, chat("Q")),
    "columns of a CSV file": (
        {"chosen": json.dumps(chat("Q", "A")), "rejected": json.dumps(chat("Q", "B"))}, chat("Q"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "beginning"), SHAPES.values(), ids=SHAPES)
def test_common_shapes_become_two_conversations(
    row: dict[str, Any], beginning: list[dict[str, str]]
) -> None:
    assert recognise([row]).name == "preference"
    found = read(row)
    assert found is not None
    for conversation, answer in zip(found, "AB", strict=True):
        assert conversation.messages == [*beginning, says(answer)]
        assert conversation.loss == "last"


def test_recognition_names_what_is_read_and_what_not() -> None:
    row = SHAPES["UltraFeedback, binarized"][0]
    assert str(recognise([row])) == (
        "preference (by columns chosen, rejected; not read: prompt, prompt_id, messages, "
        "score_chosen, score_rejected)"
    )
    assert str(recognise([SHAPES["Axolotl, chatml.argilla"][0]])) == (
        "preference (by columns instruction, chosen_response, rejected_response; "
        "chosen from 'chosen_response', rejected from 'rejected_response')"
    )
    swift = recognise([SHAPES["ms-swift"][0]])
    assert swift.columns == {"chosen": "messages", "rejected": "rejected_response"}


def test_an_answer_may_be_json() -> None:
    found = read({"prompt": "Q", "chosen": '{"a": [1]}', "rejected": '[{"b": 2}]'})
    assert found is not None
    assert [side.messages[-1]["content"] for side in found] == ['{"a": [1]}', '[{"b": 2}]']


def test_system_text_tools_and_words_of_the_recipe_reach_both_sides() -> None:
    row = {"prompt": "I am {name}", "chosen": "{name}", "rejected": "b", "tools": CALLS}
    found = read(row, own_system="for {name}", fill={"name": "Ada"})
    assert found is not None
    for side, answer in zip(found, ("Ada", "b"), strict=True):
        assert side.messages == chat("I am Ada", answer, system="for Ada")
        assert list(side.tools) == CALLS


def test_calls_of_tools_are_compared() -> None:
    call = {"function": {"name": "look", "arguments": {"at": 1}}}
    row = {
        "messages": chat("Q"), "tools": CALLS, "rejected": says("B"),
        "chosen": {"role": "assistant", "content": "", "tool_calls": [call]},
    }  # fmt: skip
    found = read(row)
    assert found is not None and found[0].messages[-1]["tool_calls"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_with_an_empty_answer_teaches_nothing(side: str) -> None:
    assert read({"prompt": "Q", "chosen": "A", "rejected": "B", side: " "}) is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another question": (
        {"chosen": chat("Q", "A"), "rejected": chat("R", "B")},
        "chosen and rejected differ before their last answer, at message 1, and only answers",
    ),
    "another length": (
        {"chosen": chat("Q", "A", "R", "C"), "rejected": chat("Q", "B")},
        "differ before their last answer, at message 2",
    ),
    "no question": ({"chosen": "A", "rejected": "B"}, "answer nothing; columns: chosen, rejected"),
    "no question in the lists": (
        {"prompt": [], "chosen": [says("A")], "rejected": [says("B")]}, "answer nothing; correct",
    ),
    "no answer": ({"chosen": chat("Q"), "rejected": chat("Q")}, "ends with role 'user'"),
    "a number": ({"prompt": "Q", "chosen": 3, "rejected": "B"}, "'chosen' is the number 3, not t"),
    "an empty list": ({"prompt": "Q", "chosen": [], "rejected": "B"}, "is an empty list"),
    "half a character": (
        {"prompt": "Q", "chosen": "\ud83d", "rejected": "B"}, "holds half a character",
    ),
    "answers to be learned": (
        {"prompt": "Q", "completion": "A"},
        "prompt_completion rows have one answer, and train.objective dpo and orpo compare two; "
        "give rows with columns chosen and rejected, or set train.objective: sft",
    ),
    "marked answers": (
        {"prompt": "Q", "completion": "A", "label": True},
        "column label: answers that are marked one by one are learned by KTO",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_rows_that_are_no_pair_are_told_in_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value).startswith("x.jsonl:7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


OWN_ROWS = {"hh-rlhf", "LLaMA-Factory, sharegpt", "Axolotl, chat_template"}
"""Chosen answers of these are learned alone as rows that one has to write."""


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - OWN_ROWS))
def test_the_advice_for_learning_chosen_answers_alone_works(name: str) -> None:
    row = SHAPES[name][0]
    source = Source(path="rows.jsonl")
    with pytest.raises(
        DataError, match=r"preferences are learned with train\.objective dpo"
    ) as got:
        to_conversation(row, source, DataSection(sources=[source]), "x.jsonl:7")
    advice = str(got.value).partition("set data.sources[].map: ")[2].partition(", or leave")[0]
    map_, _, columns = advice.partition(" and columns ")
    pairs = (pair.split(": ") for pair in columns.strip("{}").split(", ") if pair)
    source = Source(path="rows.jsonl", map=map_, columns=dict(pairs))
    found = to_conversation(row, source, DataSection(sources=[source]), "x.jsonl:7")
    assert found is not None and found.messages[-1] == says("A")


@pytest.mark.parametrize("name", sorted(OWN_ROWS))
def test_where_no_setting_helps_the_advice_is_another_row(name: str) -> None:
    source = Source(path="rows.jsonl")
    advice = r"to learn the chosen ones, write rows as \{'messages': \[...\]\}, or leave"
    with pytest.raises(DataError, match=advice):
        to_conversation(SHAPES[name][0], source, DataSection(sources=[source]), "x.jsonl:7")
