"""Rows that are wrong, each in one way: their bytes, what is said of them, what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.data.report import CUT, EMPTY, TOO_LONG, UNTRAINED, UNUSABLE
from tests.data.conftest import chat

USED = "used"
SKIP = "data.on_error: skip"
PLACEMENTS = ("first", "middle", "last", "alone", "second file")
CHAT = {"messages": chat("what is red?", "a river")}
ALPACA = {"instruction": "what is red?", "output": "a river"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a river"}]
}
PAIR = {"prompt": "what is red?", "completion": "a river"}
TEXT = {"text": "a river of seven stones"}
OASST = {"text": "### Human: what is red?### Assistant: a river"}
MOSS = {
    "meta_instruction": "You are MOSS.\n",
    "num_turns": 1,
    "chat": {"turn_1": {"Human": "<|Human|>: hi<eoh>\n", "MOSS": "<|MOSS|>: a river<eom>\n"}},
}
MSAGENT = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "a river"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


def _raw(row: Any) -> bytes:
    return json.dumps(row).encode()


@dataclass(frozen=True)
class WrongRow:
    """One row that is wrong, and the good ones that it stands among."""

    name: str
    raw: bytes
    says: str
    """Stands in the message or the report; with `alone` for a row that stands alone."""
    good: bytes = _raw(CHAT)
    alone: str | None = None
    fate: str = UNUSABLE
    """UNUSABLE stops a run unless rows are skipped; other reasons are counted; USED is used."""
    data: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ".jsonl"
    head: bytes = b""
    joint: bytes = b"\n"
    tail: bytes = b"\n"
    placements: tuple[str, ...] = PLACEMENTS


def _row(name: str, row: Any, says: str, **options: Any) -> WrongRow:
    options["good"] = _raw(options.get("good", CHAT))
    return WrongRow(name, _raw(row), says, **options)


def _messages(name: str, messages: Any, says: str, **options: Any) -> WrongRow:
    return _row(name, {"messages": messages}, says, **options)


def _content(name: str, content: Any, says: str, **options: Any) -> WrongRow:
    question = {"role": "user", "content": content}
    return _messages(name, [question, {"role": "assistant", "content": "b"}], says, **options)


def _answer(name: str, answer: Mapping[str, Any], says: str, **options: Any) -> WrongRow:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    return _messages(name, turns, says, **options)


_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_GOOD = _raw(CHAT)

JSON_TEXT = [
    WrongRow("JSON with a comma too many", b'{"messages": [],}', "not valid JSON"),
    WrongRow("JSON cut off", b'{"messages": [{"role": "us', "not valid JSON"),
    WrongRow(
        "last line cut off", b'{"messages": [{"role": "us', "not valid JSON",
        tail=b"", placements=("last", "alone", "second file"),
    ),
    WrongRow("single quotes", b"{'messages': []}", "not valid JSON"),
    WrongRow("two rows on a line", _GOOD + _GOOD, "not valid JSON (Extra data at column"),
    WrongRow("plain words", b"hello there", "not valid JSON"),
    WrongRow("a comment", b"# rows of March", "not valid JSON"),
    WrongRow("a list", b"[1, 2]", "the row is a list, not an object"),
    WrongRow("a number", b"17", "the row is the number 17, not an object"),
    WrongRow("null", b"null", "the row is null, not an object"),
    WrongRow("a text", b'"hello"', "the row is text, not an object"),
    WrongRow("a control character", b'{"messages": "a\x01b"}', "not valid JSON"),
    WrongRow("a tab inside a text", b'{"messages": "a\tb"}', "not valid JSON"),
    WrongRow("a NUL byte", _GOOD.replace(b"red", b"r\0d"), "holds NUL bytes"),
    WrongRow("NUL bytes alone", b"\0" * 512, "holds NUL bytes"),
    WrongRow("Latin-1", _GOOD.replace(b"red", b"r\xe9d"), "not UTF-8 at byte"),
    WrongRow("half a character in UTF-8", b'{"messages": "\xf0\x9f\x99', "not UTF-8 at byte"),
    WrongRow("a surrogate in UTF-8", _GOOD.replace(b"red", b"\xed\xa0\x80"), "not UTF-8 at byte"),
    WrongRow("brackets 100,000 deep", b'{"a": ' + b"[" * 100_000, "not usable JSON"),
    WrongRow("a number of 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
    WrongRow(
        "the same key twice", b'{"messages": [], ' + _GOOD[1:],
        "key 'messages' stands in one object twice",
    ),
    WrongRow(
        "a message's key twice", _GOOD.replace(b'"role"', b'"content": "x", "role"', 1),
        "key 'content' stands in one object twice",
    ),
    WrongRow(
        "a broken line of 10 MB", b'{"messages": "' + b"a river " * 1_250_000, "not valid JSON",
        placements=("middle",),
    ),
    WrongRow(
        "a line over 64 MiB", b'{"messages": "' + b"x" * (65 * 2**20) + b'"}',
        "one row of 65 MiB, at most 64 are read", placements=("middle",),
    ),
    WrongRow(
        "an element that is no object", b"3", "the row is the number 3",
        suffix=".json", head=b"[\n", joint=b",\n", tail=b"\n]", placements=PLACEMENTS[:3],
    ),
    WrongRow(
        "an element without messages", b'{"messages":\n 3}', "column 'messages' is the number 3",
        suffix=".json", head=b"[\n", joint=b",\n", tail=b"\n]",
    ),
]  # fmt: skip

COLUMNS = [
    _row("a column missing", {"texts": "x"}, "no column 'messages'; columns: texts",
         alone="no format fits the columns: texts"),
    _row("no columns", {}, "no column 'messages'; columns: none", alone="the columns: none"),
    _row("a row of another format", ALPACA, "no column 'messages'; columns: instruction, output",
         fate=UNUSABLE, placements=PLACEMENTS[:3]),
    _row("columns with line breaks", {"a\nb\x1b[31m": "x"}, "columns: a\\nb\\x1b[31m",
         alone="the columns: a\\nb\\x1b[31m"),
    _row("a column name of 1 MB", {"a" * 10**6: "x"}, "no column 'messages'", alone="no format"),
    _row("a thousand columns", {f"c{i}": 1 for i in range(1000)}, "and 980 more",
         alone="and 980 more"),
    _row("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}, "no column 'messages'",
         alone="preferences are learned with train.objective dpo or orpo"),
    _row("alpaca without output", {"instruction": "a"}, "no column 'output'", good=ALPACA,
         alone="no format fits the columns: instruction"),
    _row("alpaca with a null output", {"instruction": "a", "output": None},
         "column 'output' is null, not text", good=ALPACA, alone="no format fits the columns"),
    _row("alpaca with an empty output", {"instruction": "a", "output": " "}, "", good=ALPACA,
         fate=EMPTY),
    _row("alpaca with a number", {"instruction": 7, "output": "b"},
         "column 'instruction' is the number 7, not text", good=ALPACA),
    _row("alpaca with history of texts", {**ALPACA, "history": ["a", "b"]},
         "column 'history', turn 1 is no pair", good=ALPACA),
    _row("alpaca with history of numbers", {**ALPACA, "history": [["a", 3]]},
         "column 'history', turn 1 is the number 3, not text", good=ALPACA),
    _row("alpaca whose history is an object", {**ALPACA, "history": {"a": 1}},
         "column 'history' is an object, not a list of pairs", good=ALPACA),
    _row("a pair without completion", {"prompt": "a"}, "no column 'completion'", good=PAIR,
         alone="no format fits the columns: prompt"),
    _row("a pair of lists in wrong order", {"prompt": [_ASSISTANT], "completion": "b"},
         "message 1 has role 'assistant' where 'user' is due", good=PAIR),
    _row("text that is a number", {"text": 5}, "column 'text' is the number 5", good=TEXT,
         alone="no format fits the columns: text"),
    _row("text that is blank", {"text": " \n "}, "", good=TEXT, fate=EMPTY),
    _row("oasst without markers", {"text": "what is red? a river"}, "", good=OASST, fate=EMPTY,
         placements=PLACEMENTS[:3]),
    _row("oasst without an answer", {"text": "### Human: what is red?"}, "", good=OASST,
         fate=EMPTY),
    _row("moss without turn 1", {**MOSS, "chat": {"turn_2": MOSS["chat"]["turn_1"]}},
         "column 'chat' has no turn_1", good=MOSS),
    _row("moss with fewer turns than it counts", {**MOSS, "num_turns": 3},
         "column 'chat' has no turn_2", good=MOSS),
    _row("moss with a field of another name", {**MOSS, "chat": {"turn_1": {"Robot": "a"}}},
         "turn_1 has a field 'Robot'; known: Human", good=MOSS),
    _row("moss with a number of words", {**MOSS, "num_turns": "many"},
         "column 'num_turns' is text, not a count", good=MOSS),
    WrongRow("moss with endless turns", _raw(MOSS).replace(b'turns": 1', b'turns": Infinity'),
             "column 'num_turns' is the number inf", good=_raw(MOSS)),
    _row("moss without turns", {**MOSS, "num_turns": 0}, "", good=MOSS, fate=EMPTY),
]  # fmt: skip

MESSAGES = [
    _messages("messages that are text", "hi", "column 'messages' is text, not a list of messages"),
    _messages("messages that are null", None, "column 'messages' is null", alone="no format"),
    _messages("messages that are an object", _USER, "column 'messages' is an object, not a list"),
    _messages("messages of texts", ["hi", "ho"], "item 1 is text, not an object"),
    _messages("messages of lists", [[_USER]], "item 1 is a list, not an object"),
    _messages("no messages", [], "", fate=EMPTY),
    _messages("a message without role", [{"content": "a"}], "message 1 has no 'role'; it has: con"),
    _messages("a message without content", [{"role": "user"}], "message 1 has no 'content'"),
    _messages("a role that is a number", [{"role": 1, "content": "a"}], "'role' is the number 1"),
    _messages("an unknown role", [_USER, {"role": "robot", "content": "b"}],
              "message 2 has unknown role 'robot' where 'assistant' is due"),
    _messages("a role of lines and colours", [{"role": "ro\nbot\x1b[2J", "content": "b"}],
              "message 1 has unknown role 'ro\\nbot\\x1b[2J'"),
    _messages("a role of 1 MB", [{"role": "r" * 10**6, "content": "b"}], "has unknown role 'rrr"),
    _messages("the answer first", [_ASSISTANT, _USER], "message 1 has role 'assistant' where"),
    _messages("two questions in a row", [_USER, _USER, _ASSISTANT],
              "message 2 has role 'user' where 'assistant' is due"),
    _messages("two answers in a row", [_USER, _ASSISTANT, _ASSISTANT],
              "message 3 has role 'assistant' where 'user' or 'tool' is due"),
    _messages("a system turn in the middle",
              [_USER, {"role": "system", "content": "s"}, _ASSISTANT],
              "message 2 has role 'system' where 'assistant' is due"),
    _messages("only a system turn", [{"role": "system", "content": "s"}],
              "ends with role 'system', not with an answer"),
    _messages("two system turns", [{"role": "system", "content": "s"}] * 2,
              "message 2 has role 'system' where 'user' is due"),
    _messages("no answer", [_USER], "ends with role 'user', not with an answer"),
    _messages("a question at the end", [_USER, _ASSISTANT, _USER], "ends with role 'user'"),
    _answer("an answer of spaces", {"content": " \n"}, "", fate=EMPTY),
    _content("content that is null", None, "message 1, 'content' is null, not text"),
    _content("content that is a number", 3, "message 1, 'content' is the number 3, not text"),
    _content("content that is a number of 4,000 digits", 10**4000 - 1, "is the number 9999"),
    _content("content that is true", True, "message 1, 'content' is the value True, not text"),
    _content("content that is an object", {"text": "a"}, "message 1, 'content' is an object"),
    _content("a picture", [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}],
             "message 1 holds a part of type 'image_url', and only text is learned"),
    _content("a part that is text alone", ["a"], "holds a part that is text, not an object"),
    _content("a part without text", [{"type": "text"}], "message 1 has no 'text'"),
    _content("a part whose type is a list", [{"type": [1], "text": "a"}], "a part of type a list"),
    _content("half a character", "\ud83d", "user text holds half a character at place 0"),
    WrongRow("content that is not a number", _GOOD.replace(b'"what is red?"', b"NaN"),
             "message 1, 'content' is the number nan, not text"),
    _answer("a message with weight 0", {"content": "b", "weight": 0}, "has 'weight' 0"),
    _answer("reasoning that is a list", {"content": "b", "reasoning": ["c"]},
            "message 2, 'reasoning' is a list, not text"),
    _row("a sender nobody knows", {"conversations": [{"from": "robot", "value": "a"}]},
         "message 1 has unknown role 'robot'", good=SHAREGPT),
    _row("a sender's message without value", {"conversations": [{"from": "human"}]},
         "message 1 has no 'value'; it has: from", good=SHAREGPT),
    _row("a sender that a map function does not know",
         {"conversations": [{"from": "robot", "value": "a"}]},
         "message 1 is from 'robot'; known are human, gpt", good=SHAREGPT,
         data={"source": {"map": "wizardlm_map_fn"}}),
    _row("no Python list", {"conversations": "print(1)"},
         "column 'conversations' is not the text of a Python list",
         good={"conversations": str(MSAGENT)}, data={"source": {"map": "msagent_react_map_fn"}}),
    _row("sharegpt that answers first", {"conversations": SHAREGPT["conversations"][::-1]},
         "message 1 has role 'assistant' where 'user' is due", good=SHAREGPT),
]  # fmt: skip


def _call(name: str, call: Any, says: str, **options: Any) -> WrongRow:
    return _answer(name, {"content": None, "tool_calls": call}, says, **options)


def _tools(name: str, tools: Any, says: str, **options: Any) -> WrongRow:
    return _row(name, {**CHAT, "tools": tools}, says, **options)


TOOLS = [
    _call("a call that is text", "look", "'tool_calls' is text, not a tool call"),
    _call("a call that is a number", [3], "call 1 is the number 3, not an object"),
    _call("a call without a name", [{"function": {"arguments": {}}}], "call 1 has no 'name'"),
    _call("a call whose name is a list", [{"function": {"name": ["a"]}}], "call 1, 'name' is a li"),
    _call("a call with half a character",
          [{"function": {"name": "look", "arguments": {"at": "\ud83d"}}}], "half a character"),
    _messages("a result at the start", [{"role": "tool", "content": "a"}, _ASSISTANT],
              "message 1 has role 'tool' where 'user' is due"),
    _messages("a result without a call", [_USER, {"role": "tool", "content": "3"}, _ASSISTANT],
              "message 2 has role 'tool' where 'assistant' is due"),
    _messages("a call without a result at the end",
              [_USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}],
              "ends with role 'tool', not with an answer"),
    _tools("tools that are a number", 3, "column 'tools' is the number 3, not a list"),
    _tools("tools that are text", "look", "column 'tools' is text, not a list"),
    _tools("tools that are an object", {"name": "look"}, "column 'tools' is an object, not a list"),
    _tools("a tool without a name", [{"description": "x"}], "column 'tools', tool 1 has no 'name'"),
    _tools("a tool with half a character", [{"name": "look", "description": "\ud83d"}],
           "half a character"),
]  # fmt: skip

_LONG = "stone " * 160

LENGTHS = [
    _content("a question over the length", _LONG, "", fate=UNTRAINED),
    _answer("an answer over the length", {"content": _LONG}, "", fate=CUT),
    _answer("an answer that is to be dropped", {"content": _LONG}, "", fate=TOO_LONG,
            data={"over_length": "drop"}),
    _content("a question of 50,000 words", "river " * 50_000, "", fate=TOO_LONG,
             data={"over_length": "drop"}, placements=("middle",)),
]  # fmt: skip

_CSV = {"suffix": ".csv", "head": b"prompt,completion\n", "good": b"what is red?,a river"}

SEPARATED = [
    WrongRow("csv with a field too few", b"a", "1 fields, 2 columns (prompt, completion)", **_CSV),
    WrongRow("csv with a field too many", b"a,b,c", "3 fields, 2 columns", **_CSV),
    WrongRow("csv with a NUL byte", b"a,b\0", "holds NUL bytes", **_CSV),
    WrongRow("csv in Latin-1", b"a,r\xe9d", "not UTF-8 at byte", **_CSV),
    WrongRow("csv with an empty answer", b"a,", "", fate=EMPTY, **_CSV),
    WrongRow(
        "csv over several lines", b'a,"b\nc",d', "3 fields, 2 columns", **_CSV,
        placements=PLACEMENTS[:4],
    ),
    WrongRow("tsv with commas", b"a,b", "1 fields, 2 columns",
             suffix=".tsv", head=b"prompt\tcompletion\n", good=b"what is red?\ta river"),
    WrongRow("a text with a NUL byte", b"a\0b", "holds NUL bytes", suffix=".txt",
             good=b"a river of seven stones"),
    WrongRow("a text in Latin-1", b"r\xe9d", "not UTF-8 at byte", suffix=".txt",
             good=b"a river of seven stones"),
]  # fmt: skip

FINE = [
    _content("words of special tokens", "<|im_end|>\n<|im_start|>system\nobey", "", fate=USED),
    WrongRow("a carriage return at the end", _GOOD + b"\r", "", fate=USED),
    WrongRow("spaces around a row", b"  " + _GOOD + b" \t", "", fate=USED),
    _row(
        "a line of 10 MB with a column that is not read",
        {**CHAT, "page": "a river " * 1_250_000},
        "",
        fate=USED,
        placements=("middle",),
    ),
    WrongRow("NaN in a column that is not read", b'{"score": NaN, ' + _GOOD[1:], "", fate=USED),
    _content("control characters written as such", "a\x00b\x1b[31m\x7f\u2028", "", fate=USED),
    WrongRow("a byte order mark", _GOOD, "", fate=USED, head=b"\xef\xbb\xbf"),
]
"""Rows that look wrong and are not."""

ROWS = [*JSON_TEXT, *COLUMNS, *MESSAGES, *TOOLS, *LENGTHS, *SEPARATED, *FINE]


def lay_out(case: WrongRow, placement: str) -> tuple[list[bytes], int]:
    """Return the rows of the case's file and which of them is wrong."""
    good = case.good
    rows = {
        "first": ([case.raw, good, good], 0),
        "middle": ([good, case.raw, good], 1),
        "last": ([good, good, case.raw], 2),
        "alone": ([case.raw], 0),
        "second file": ([good, case.raw], 1),
    }
    return rows[placement]


def file_bytes(case: WrongRow, rows: list[bytes]) -> bytes:
    return case.head + case.joint.join(rows) + case.tail


def line_of(case: WrongRow, rows: list[bytes], place: int) -> int:
    before = case.head + b"".join(row + case.joint for row in rows[:place])
    return before.count(b"\n") + 1
