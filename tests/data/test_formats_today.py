"""Formats of today: read right, recognised from the columns, once per data set, and said why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data.rows.formats import FORMATS, TODAY
from raytune_ft.data.rows.recognition import recognise
from raytune_ft.data.segments import Message
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.errors import DataError, RecipeError
from tests.data.conftest import chat, read_row, write_jsonl

WEATHER = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
MOSS = {
    "meta_instruction": "You are MOSS.\n",
    "num_turns": 1,
    "chat": {"turn_1": {"Human": "<|Human|>: Hi<eoh>\n", "MOSS": "<|MOSS|>: Hello<eom>\n"}},
}

RECOGNISED: dict[str, tuple[dict[str, Any], str, list[Message]]] = {
    "alpaca": (
        {"instruction": "Translate.", "input": "bonjour", "output": "hello", "text": "all of it"},
        "alpaca",
        chat("Translate.\nbonjour", "hello"),
    ),
    "alpaca without input": ({"instruction": "a", "output": "b"}, "alpaca", chat("a", "b")),
    "alpaca, input is null": (
        {"instruction": "a", "input": None, "output": "b"},
        "alpaca",
        chat("a", "b"),
    ),
    "alpaca of LLaMA-Factory": (
        {
            "instruction": "c",
            "input": "",
            "output": "d",
            "system": "Be kind.",
            "history": [["a", "b"]],
        },
        "alpaca",
        chat("a", "b", "c", "d", system="Be kind."),
    ),
    "alpaca in Chinese": (
        {"instruction_zh": "甲", "input_zh": "乙", "output_zh": "丙"},
        "alpaca",
        chat("甲\n乙", "丙"),
    ),
    "dolly": (
        {"instruction": "a", "context": "b", "response": "c", "category": "qa"},
        "alpaca",
        chat("a\nb", "c"),
    ),
    "openai": ({"messages": chat("a", "b"), "id": 3}, "openai", chat("a", "b")),
    "openai as a JSON text": ({"messages": json.dumps(chat("a", "b"))}, "openai", chat("a", "b")),
    "openai under another name": ({"dialog": chat("a", "b")}, "openai", chat("a", "b")),
    "developer is system": (
        {"messages": [{"role": "developer", "content": "s"}, *chat("a", "b")]},
        "openai",
        chat("a", "b", system="s"),
    ),
    "parts of text": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": "c"},
            ]
        },
        "openai",
        chat("ab", "c"),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "sharegpt",
        chat("a", "b"),
    ),
    "sharegpt with a system column": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
        "sharegpt",
        chat("a", "b", system="s"),
    ),
    "roles in conversations": ({"conversations": chat("a", "b")}, "openai", chat("a", "b")),
    "XTuner": ({"conversation": [{"input": "a", "output": "b"}]}, "conversation", chat("a", "b")),
    "prompt and completion": (
        {"prompt": "a", "completion": "b"},
        "prompt_completion",
        chat("a", "b"),
    ),
    "prompt and completion as messages": (
        {"prompt": chat("a", system="s"), "completion": [{"role": "assistant", "content": "b"}]},
        "prompt_completion",
        chat("a", "b", system="s"),
    ),
    "prompt and response": ({"prompt": "a", "response": "b"}, "prompt_response", chat("a", "b")),
    "question and answer": ({"question": "a", "answer": "b"}, "question_answer", chat("a", "b")),
    "openorca": (
        {"id": "1", "system_prompt": "s", "question": "a", "response": "b"},
        "question_response",
        chat("a", "b", system="s"),
    ),
    "query and response": ({"query": "a", "response": "b"}, "query_response", chat("a", "b")),
    "input and output": ({"input": "a", "output": "b"}, "input_output", chat("a", "b")),
    "problem and solution": (
        {"problem": "a", "solution": "b"},
        "prompt_completion",
        chat("a", "b"),
    ),
    "text": (
        {"text": " plain\n", "meta": {}},
        "text",
        [{"role": "assistant", "content": "plain"}],
    ),
    "content": ({"content": "plain"}, "text", [{"role": "assistant", "content": "plain"}]),
    "oasst1": ({"text": "### Human: a### Assistant: b"}, "oasst1", chat("a", "b")),
    "msagent": (
        {"conversations": "[{'from': 'user', 'value': 'a'}, {'from': 'assistant', 'value': 'b'}]"},
        "msagent_react_map_fn",
        chat("a\n", "Final Answer:b\n"),
    ),
}


@pytest.mark.parametrize(("row", "name", "messages"), RECOGNISED.values(), ids=RECOGNISED)
def test_a_format_is_told_from_the_columns(
    row: dict[str, Any], name: str, messages: list[Message]
) -> None:
    found = recognise([row])
    assert found.name == name
    assert "\n" not in str(found)
    conversation = read_row(row)
    assert conversation is not None
    assert list(conversation.messages) == messages
    by_name = read_row(row, name, columns=found.columns)
    assert by_name == conversation


def test_unread_and_renamed_columns_are_said() -> None:
    row = {"instruction": "a", "context": "b", "response": "c", "category": "qa"}
    assert str(recognise([row])) == (
        "alpaca (by columns instruction, context, response; input from 'context', "
        "output from 'response'; not read: category)"
    )


def test_moss_rows_are_written_not_templated() -> None:
    assert recognise([MOSS]).name == "moss"
    found = read_row(MOSS, loss="last", fill={"bot_name": "Ada"})
    assert found is not None and found.written is not None
    assert (found.loss, len(found.messages)) == ("last", 0)
    assert "".join(part.text for part in found.written) == (
        "You are Ada.\n<|Human|>: Hi<eoh>\n<|Ada|>: Hello<eom>\n"
    )
    assert read_row({**MOSS, "num_turns": 0}) is None


# Tools and reasoning.


def test_openai_tools_calls_and_reasoning_are_kept() -> None:
    row = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Weather in Ulm?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Look it up.",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "3 °C"},
            {"role": "assistant", "content": "Three degrees.", "thinking": "Easy."},
        ],
    }
    found = read_row(row, loss="all")
    assert found is not None
    assert found.tools == (TOOL,)
    assert found.loss == "all"
    assert found.messages == [
        {"role": "user", "content": "Weather in Ulm?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Look it up.",
            "tool_calls": [{"id": "c1", **CALL}],
        },
        {"role": "tool", "content": "3 °C", "name": "weather", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Three degrees.", "reasoning_content": "Easy."},
    ]


@pytest.mark.parametrize("tools", [[TOOL], [WEATHER], json.dumps([WEATHER]), json.dumps([TOOL])])
def test_sharegpt_calls_are_openai_calls(tools: Any) -> None:
    row = {
        "tools": tools,
        "conversations": [
            {"from": "human", "value": "Weather in Ulm?"},
            {
                "from": "function_call",
                "value": '{"name": "weather", "arguments": {"city": "Ulm"}}',
            },
            {"from": "observation", "value": "3 °C"},
            {"from": "gpt", "value": "Three degrees."},
        ],
    }
    found = read_row(row)
    assert found is not None
    assert found.tools == (TOOL,)
    assert found.messages == [
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3 °C"},
        {"role": "assistant", "content": "Three degrees."},
    ]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_is_no_tools(tools: Any) -> None:
    found = read_row({"messages": chat("a", "b"), "tools": tools})
    assert found is not None and found.tools == ()


USER = {"role": "user", "content": "a"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tool first": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' where 'user'"),
    "tool after user": (
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        "message 2 has role 'tool' where 'assistant' is due",
    ),
    "ends with a tool": (
        {"messages": [*chat("a", "b"), {"role": "tool", "content": "x"}]},
        "ends with role 'tool'",
    ),
    "call without a name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "message 2, 'tool_calls', call 1 has no 'name'",
    ),
    "calls that are text": (
        {"messages": [USER, {"role": "assistant", "tool_calls": "x"}]},
        "'tool_calls' is text, not a tool call",
    ),
    "tool without a name": (
        {"messages": chat("a", "b"), "tools": [{"description": "x"}]},
        "column 'tools', tool 1 has no 'name'",
    ),
    "tools that are a number": (
        {"messages": chat("a", "b"), "tools": 3},
        "column 'tools' is the number 3",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "part of type 'image_url', and only text is learned",
    ),
    "a message with weight 0": (
        {"messages": [USER, {"role": "assistant", "content": "b", "weight": 0}]},
        "message 2 has 'weight' 0",
    ),
    "broken call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "no json"},
            ]
        },
        "message 2 is text, not a tool call",
    ),
    "history is text": (
        {"instruction": "a", "output": "b", "history": "earlier"},
        "column 'history' is text, not a list of pairs",
    ),
    "history of single texts": (
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "column 'history', turn 1 is no pair",
    ),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "preferences are learned with train.objective dpo or orpo; to learn the chosen ones, "
        "set data.sources[].map: prompt_completion and columns {completion: chosen}",
    ),
    "preferences as messages": (
        {"chosen": chat("a", "b"), "rejected": chat("a", "c")},
        "set data.sources[].map: openai and columns {messages: chosen}",
    ),
    "marked answers": (
        {"prompt": "a", "completion": "b", "label": False},
        "column label: answers that are marked one by one are learned by KTO",
    ),
    "unknown columns": (
        {"a": 1, "b": 2},
        "no format fits the columns: a, b; set data.sources[].map to alpaca",
    ),
    "two pairs": (
        {"question": "a", "answer": "b", "response": "c"},
        "several of the columns question, answer, response could be learned",
    ),
    "two lists": (
        {"messages": chat("a", "b"), "conversations": chat("a", "b")},
        "several of the columns messages, conversations could be learned",
    ),
    "context that would be lost": (
        {"context": "a", "question": "b", "answer": "c"},
        "column 'context' would be left out of the question by question_answer; set",
    ),
    "answer is null": ({"prompt": "a", "completion": None}, "no format fits"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_rows_that_do_not_fit_are_told_in_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_row(row, where="x.jsonl:7")
    assert str(caught.value).startswith("x.jsonl:7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_advice_for_preferences_works() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    found = read_row(row, "prompt_completion", columns={"completion": "chosen"})
    assert found is not None and found.messages == chat("a", "b")
    row = {"chosen": chat("a", "b"), "rejected": chat("a", "c")}
    found = read_row(row, "openai", columns={"messages": "chosen"})
    assert found is not None and found.messages == chat("a", "b")


# One decision per data set.


def opened(path: Path, **source: Any) -> RowSource:
    section = DataSection.model_validate({"sources": [{"path": str(path), **source}]})
    return open_sources(section, 1)


def test_most_of_the_first_rows_decide_and_the_odd_one_is_named(tmp_path: Path) -> None:
    pair, odd = {"prompt": "a", "completion": "b"}, {"text": "c"}
    path = write_jsonl(tmp_path / "a.jsonl", [odd, pair, pair])
    rows = opened(path)
    assert str(rows.recognised[0]) == (
        "prompt_completion (by columns prompt, completion, in 2 of the first 3 rows)"
    )
    source, data = rows.source_of(0), DataSection(sources=[rows.source_of(0)])
    assert (source.map, rows.source_of(2)) == ("prompt_completion", source)
    from raytune_ft.data.rows.formats import to_conversation

    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'prompt'; columns: text"):
        to_conversation(odd, source, data, rows.where(0))


def test_columns_seen_only_in_some_rows_are_renamed_in_all(tmp_path: Path) -> None:
    plain = {"instruction": "a", "context": None, "response": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [plain, plain, {**plain, "context": "c"}])
    assert opened(path).source_of(0).columns == {"input": "context", "output": "response"}


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["messages", "text", "prompt", "completion", "response", "input", "output", "x"]
            ),
            st.one_of(st.none(), st.text(max_size=3), st.integers(), st.just(chat("a", "b"))),
        ),
        max_size=5,
    )
)
def test_recognition_always_answers_and_always_the_same(rows: list[dict[str, Any]]) -> None:
    found = recognise(rows)
    assert recognise([dict(row) for row in rows]) == found
    assert found.name is None or found.name in FORMATS
    if found.name is None:
        assert "set data.sources[].map" in found.why


# A wrong guess is one field away.


def test_map_takes_formats_and_columns_renames(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "a", "a": "b", "text": "c"}])
    for name in ("question_answer", None):
        rows = opened(path, map=name, columns={"question": "q", "answer": "a"})
        assert rows.source_of(0).map == "question_answer"
        found = read_row(rows.rows([0])[0], "question_answer", columns=rows.source_of(0).columns)
        assert found is not None and found.messages == chat("a", "b")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"map": "alpacca"}, "no format or map function 'alpacca'; did you mean 'alpaca'?"),
        ({"map": "zzz"}, "choose: alpaca, sharegpt, openai,"),
        (
            {"map": "alpaca", "columns": {"instructoin": "q"}},
            "'instructoin' is no column of alpaca; it reads instruction, output, input",
        ),
        (
            {"map": "question_answer", "columns": {"question": "qu"}},
            r"no column 'qu' in .*; did you mean 'q'\?",
        ),
    ],
)
def test_wrong_names_are_recipe_errors(
    tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "a", "answer": "b"}])
    with pytest.raises(RecipeError, match=rf"^data\.sources\[0\]\..*{message}") as caught:
        opened(path, **source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(TODAY) - {"moss", "preference"}))
def test_every_format_names_a_missing_column(name: str) -> None:
    for column in TODAY[name].columns:
        with pytest.raises(DataError, match=rf"^x:1: .*no column '{column}'; columns: "):
            row = {other: "a" for other in TODAY[name].columns if other != column}
            read_row({**row, "other": 1}, name, where="x:1")
