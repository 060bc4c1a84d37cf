"""Answers on the terminal while they are written: as text, as markdown, or beside each other.

Plain text goes where the output is no terminal, so that it can be piped. A model's text loses its
control characters first and never becomes a link, so that it cannot steer the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from raytune_ft.chat.text import printable

FENCE = "```"
REDRAWS_PER_S = 12


class Writer(Protocol):
    """Shows the answers of one turn."""

    def push(self, side: int, text: str) -> None:
        """Show more of the answer of one side."""

    def end(self, note: str = "") -> None:
        """Show what is left, and a note such as `stopped`."""


class PlainWriter:
    """Writes text as it comes; of several sides one after the other, each below its label."""

    def __init__(self, out: TextIO, labels: Sequence[str] = ()) -> None:
        self._out, self._labels = out, labels
        self._answers: list[list[str]] = [[] for _ in labels]

    def push(self, side: int, text: str) -> None:
        """Write at once where there is one side; keep it for the end otherwise."""
        if self._labels:
            self._answers[side].append(text)
            return
        self._out.write(printable(text))
        self._out.flush()

    def end(self, note: str = "") -> None:
        """End the line."""
        for label, answer in zip(self._labels, self._answers, strict=True):
            self._out.write(f"[{label}]\n{printable(''.join(answer))}\n")
        self._out.write(f" [{note}]\n" if note else "\n")
        self._out.flush()


class MarkdownWriter:
    """Shows one answer as markdown: whole blocks stay, the last one is drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._rest = ""
        self._live = Live(
            console=console, transient=True, refresh_per_second=REDRAWS_PER_S,
            vertical_overflow="ellipsis",
        )  # fmt: skip
        self._live.start()

    def push(self, side: int, text: str) -> None:
        """Take more text; blocks that are whole by it are shown for good."""
        done, self._rest = whole_blocks(self._rest + printable(text))
        if done.strip():
            self._live.console.print(_markdown(done))
        self._live.update(_markdown(self._rest))

    def end(self, note: str = "") -> None:
        """Show the last block for good."""
        self._live.update(Text(""))
        self._live.stop()
        console = self._live.console
        if self._rest.strip():
            console.print(_markdown(self._rest))
        if note:
            console.print(Text(f"[{note}]", style="dim"))


class SideBySide:
    """Shows two answers in columns while both are written."""

    def __init__(self, console: Console, labels: Sequence[str]) -> None:
        self._labels, self._texts = labels, [""] * len(labels)
        self._live = Live(
            console=console, transient=True, refresh_per_second=REDRAWS_PER_S,
            vertical_overflow="ellipsis",
        )  # fmt: skip
        self._live.start()

    def push(self, side: int, text: str) -> None:
        """Take more text of one side."""
        self._texts[side] += printable(text)
        self._live.update(self._table())

    def end(self, note: str = "") -> None:
        """Show both answers for good."""
        self._live.update(Text(""))
        self._live.stop()
        self._live.console.print(self._table())
        if note:
            self._live.console.print(Text(f"[{note}]", style="dim"))

    def _table(self) -> Table:
        table = Table(expand=True, header_style="bold")
        for number, label in enumerate(self._labels, start=1):
            table.add_column(Text(f"{number} {label}"), ratio=1, overflow="fold")
        table.add_row(*(_markdown(text) for text in self._texts))
        return table


def writer_for(out: TextIO, labels: Sequence[str], *, plain: bool = False) -> Writer:
    """Return what shows a turn's answers on `out`; `labels` of all sides where there are two."""
    several = labels if len(labels) > 1 else ()
    if plain or not out.isatty():
        return PlainWriter(out, several)
    console = Console(file=out, highlight=False)
    return SideBySide(console, several) if several else MarkdownWriter(console)


def whole_blocks(text: str) -> tuple[str, str]:
    """Split markdown behind its last blank line that stands outside of code: (done, rest)."""
    end = place = 0
    in_code = False
    for line in text.splitlines(keepends=True):
        place += len(line)
        if line.lstrip().startswith(FENCE):
            in_code = not in_code
        elif not line.strip() and line.endswith("\n") and not in_code:
            end = place
    return text[:end], text[end:]


def _markdown(text: str) -> Markdown:
    return Markdown(text, hyperlinks=False)
