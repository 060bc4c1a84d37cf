"""What the terminal shows: markdown in blocks, columns, plain text where it is piped."""

from __future__ import annotations

import io
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from raytune_ft.chat.reading import message_reader
from raytune_ft.chat.rendering import (
    MarkdownWriter,
    PlainWriter,
    SideBySide,
    whole_blocks,
    writer_for,
)

ANSWER = "# Rivers\n\nThe **Nile** is long.\n\n```python\nx = 1\n\ny = 2\n```\n\n- one\n- two\n"


def screen(width: int = 60) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@given(text=st.text(st.sampled_from("a `\n#-"), max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_blocks_are_the_text_whatever_the_pieces(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    shown, rest = "", ""
    for start, end in pairwise(places):
        done, rest = whole_blocks(rest + text[start:end])
        shown += done
    assert shown + rest == text


def test_code_stays_one_block() -> None:
    head, rest = whole_blocks("text\n\n```\na\n\nb\n")
    assert (head, rest) == ("text\n\n", "```\na\n\nb\n")


def test_markdown_is_shown_once_and_whole() -> None:
    console = screen()
    writer = MarkdownWriter(console)
    for start in range(0, len(ANSWER), 3):
        writer.push(0, ANSWER[start : start + 3])
    writer.end("stopped")
    last = written(console).split("\x1b[2K")[-1]  # what stays when the live part is wiped
    assert "• two" in last and "[stopped]" in last
    assert "**" not in last


def test_two_answers_stand_beside_each_other() -> None:
    console = screen()
    writer = SideBySide(console, ["ada", "base"])
    writer.push(0, "left")
    writer.push(1, "right")
    writer.end()
    rows = written(console).splitlines()
    assert any("left" in row and "right" in row for row in rows)
    assert any("1 ada" in row and "2 base" in row for row in rows)


def test_a_pipe_gets_text_without_control_characters() -> None:
    out = io.StringIO()
    writer = writer_for(out, ["one"])
    assert isinstance(writer, PlainWriter)
    writer.push(0, "a\x1b[2Jb **c**")
    writer.end()
    assert out.getvalue() == "a[2Jb **c**\n"


def test_links_of_a_model_are_shown_and_not_made() -> None:
    console = screen(100)
    writer = MarkdownWriter(console)
    writer.push(0, "[click](https://example.org/x)")
    writer.end()
    assert "https://example.org/x" in written(console)
    assert "\x1b]8" not in written(console)


def test_triple_quotes_join_lines() -> None:
    lines = iter(["one\n", '"""two\n', "three\n", 'four"""\n', '/bad """a\n', 'b"""\n'])
    read = message_reader(lambda: next(lines))
    assert [read(), read(), read()] == ["one", "two\nthree\nfour", "/bad a\nb"]
