"""Rows that are wrong: told by file and line, one line each, and counted where they are skipped.

Every kind stands first, in the middle, last, alone and in a second file, and is read by the way
that training takes: sources, windows, packs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.counting import estimate
from raytune_ft.data.examples import Encoder
from raytune_ft.data.files.blobs import LocalBlob
from raytune_ft.data.files.json_files import open_jsonl
from raytune_ft.data.places import iter_packs
from raytune_ft.data.report import CUT, UNUSABLE, Report
from raytune_ft.data.rows.formats import FORMATS
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.errors import DataError
from tests.data.chat_families import FAMILIES
from tests.data.feeds import feed_of, total
from tests.data.wrong_rows import (
    CALL,
    CHAT,
    MOSS,
    ROWS,
    SHAREGPT,
    SKIP,
    USED,
    WrongRow,
    file_bytes,
    lay_out,
    line_of,
)

LONGEST_MESSAGE = 1000
CASES = [
    pytest.param(case, placement, id=f"{case.name}-{placement}")
    for case in ROWS
    for placement in case.placements
]


def read_all(feed: Feed) -> tuple[set[int], Report]:
    """Read an epoch; return the rows that stand in packs, and what was said of the others."""
    placed = list(iter_packs(feed, epochs=1))
    known = estimate(feed)
    assert known.exact
    assert known.packs == len(placed)
    return {int(row) for one in placed for row in one.pack.row_ids}, total(placed)


def assert_one_line(message: str, start: str, says: str) -> None:
    assert message.startswith(start), message[:300]
    assert says in message, message[:300]
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE


def test_sixty_kinds_and_no_name_twice() -> None:
    names = [case.name for case in ROWS]
    assert len(names) == len(set(names))
    assert sum(case.fate == UNUSABLE for case in ROWS) >= 60


@pytest.mark.parametrize(("case", "placement"), CASES)
def test_a_wrong_row_is_named_or_counted(
    tmp_path: Path, tokenizer: TextTokenizer, case: WrongRow, placement: str
) -> None:
    rows, place = lay_out(case, placement)
    path = tmp_path / f"rows{case.suffix}"
    before = 0
    if placement == "second file":
        good = [case.good] * 3
        (tmp_path / f"before{case.suffix}").write_bytes(file_bytes(case, good))
        before = len(good)
    path.write_bytes(file_bytes(case, rows))
    given = tmp_path if before else path
    where = f"{path}:{line_of(case, rows, place)}"
    says = case.says if case.alone is None or placement != "alone" else case.alone
    wrong, everything = before + place, set(range(before + len(rows)))

    if case.fate == UNUSABLE:
        with pytest.raises(DataError) as stopped:
            read_all(feed_of(given, tokenizer, **case.data))
        assert_one_line(str(stopped.value), f"{where}: ", says)
        assert SKIP in str(stopped.value)
    for on_error in ("skip",) if case.fate == UNUSABLE else ("stop", "skip"):
        feed = feed_of(given, tokenizer, on_error=on_error, **case.data)
        if placement == "alone" and case.fate not in (USED, CUT):
            with pytest.raises(DataError) as none_left:
                read_all(feed)
            expected = "data.sources: none of 1 rows can be trained on: 1 " + case.fate
            assert_one_line(str(none_left.value), f"{expected} ({where}", says)
            continue
        used, report = read_all(feed)
        assert report["rows"] == len(everything)
        assert used == (everything if case.fate in (USED, CUT) else everything - {wrong})
        assert report["used"] == len(used)
        assert report["dropped"] == ({} if case.fate in (USED, CUT) else {case.fate: 1})
        if case.fate == USED:
            assert report["places"] == {}
        else:
            (named,) = report["places"][case.fate]
            assert_one_line(named, where, says)


NAMES = [
    "role", "content", "from", "value", "name", "arguments", "function", "parameters", "tools",
    "tool_calls", "function_call", "text", "type", "prompt", "output", "turn_1", "Human", "weight",
    "reasoning",
]  # fmt: skip
WORDS = st.sampled_from(
    [*NAMES, "user", "assistant", "tool", "human", "gpt", "[1]", "{}", "\ud83d"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=8,
)
CALLED = {
    "messages": [
        CHAT["messages"][0],
        {"role": "assistant", "content": "look", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "stones"},
        CHAT["messages"][1],
    ],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"a": 1}}}],
}


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A good row with another value somewhere in it."""
    row = json.loads(json.dumps(draw(st.sampled_from([CALLED, SHAREGPT, MOSS]))))
    inside: Any = row
    while True:
        place = draw(
            st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
        )
        deeper = inside[place]
        if not isinstance(deeper, dict | list) or not deeper or draw(st.integers(0, 3)) == 0:
            inside[place] = draw(VALUES)
            return row
        inside = deeper


@settings(max_examples=300)
@given(
    row=damaged() | st.dictionaries(WORDS, VALUES, max_size=4),
    name=st.none() | st.sampled_from([*FORMATS]),
)
def test_whatever_stands_in_a_row_it_is_read_or_told_in_one_line(
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    row: dict[str, Any],
    name: str | None,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    reader = open_jsonl(LocalBlob(path), "a.jsonl")
    (read,) = reader.read([0])
    if isinstance(read, DataError):
        assert_one_line(str(read), "a.jsonl:1: ", SKIP)
        return
    source = Source(path="a.jsonl", map=name)
    data = DataSection(sources=[source], max_length=64)
    encoder = Encoder(FAMILIES["qwen25"].tokenizer(tokenizer), "tokenizer", data)
    try:
        example = encoder.encode(read, source, "a.jsonl:1")
    except DataError as error:
        assert_one_line(str(error), "a.jsonl:1: ", SKIP)
    else:
        assert example is None or len(example.input_ids) == len(example.labels) <= 64
