"""The view on a terminal: colours where there are any, marks that show without them too."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from raytune_ft.inspection.view import Bar, RowView, View
from raytune_ft.planning import print_pairs

OPEN, CLOSE = "⟦", "⟧"
"""Stand around trained tokens, so that they show without colours too."""
ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
WIDTH = 60
"""Columns of a full pack and of the longest bar."""
SHADES = ("█", "▓")
"""Of neighbouring samples in a pack."""
SAMPLE_STYLES = ("cyan", "blue")


def show(view: View, console: Console | None = None) -> None:
    """Print a view."""
    console = console or Console(highlight=False, soft_wrap=True)
    for source, what in view.formats:
        console.print(Text.assemble((source, "bold"), f": {what}"))
    console.print()
    for row in view.rows:
        for line in row_lines(row):
            console.print(line)
        console.print()
    _section(console, view.lengths_title, bar_lines(view.bars))
    title = f"First packs, {view.max_length} tokens wide, a shade per sample"
    _section(console, title, (pack_line(pack, view.max_length) for pack in view.packs))
    print_pairs(view.counts)
    if view.sampled:
        console.print(f"{view.sampled} were read; figures with ~ are estimates", style="dim")


def _section(console: Console, title: str, lines: Iterator[Text]) -> None:
    drawn = list(lines)
    if drawn:
        console.print(Text(title, style="bold"))
        for line in drawn:
            console.print(line)
        console.print()


def row_lines(row: RowView) -> Iterator[Text]:
    """Write one row: its turns, then its tokens."""
    if row.dropped is not None:
        yield Text(f"dropped: {row.dropped}", style="yellow")
        return
    yield Text(row.where, style="bold")
    for role, text in row.turns:
        yield Text.assemble(("  " + f"{role}: ", ROLE_STYLES.get(role, "bold")), text)
    cut = f", cut from {row.uncut_length}" if row.uncut_length > row.n_tokens else ""
    yield Text(
        f"  {row.n_tokens} tokens{cut}, {row.n_targets} trained {OPEN}so{CLOSE}:", style="dim"
    )
    yield token_text(row)


def token_text(row: RowView) -> Text:
    """Write a row's tokens, special ones visible and trained stretches marked."""
    text, inside = Text(), False
    for piece in row.pieces:
        if piece.trained != inside:
            text.append(OPEN if piece.trained else CLOSE, "bold green")
            inside = piece.trained
        style = "green" if piece.trained else "dim"
        text.append(piece.text, f"{style} reverse" if piece.special else style)
    if inside:
        text.append(CLOSE, "bold green")
    return text


def bar_lines(bars: list[Bar]) -> Iterator[Text]:
    """Draw the histogram of row lengths."""
    most = max((bar.rows for bar in bars), default=0)
    width = max((len(bar.label) for bar in bars), default=0)
    for bar in bars:
        size = -(-bar.rows * WIDTH // most)
        label = f"  {bar.label:>{width}}  "
        yield Text.assemble((label, "dim"), ("█" * size, "cyan"), f" {bar.rows:,}")


def pack_line(sizes: list[int], max_length: int) -> Text:
    """Draw a pack: each sample as wide as its share, what stays empty as dots."""
    line, end, drawn = Text("  "), 0, 0
    for place, size in enumerate(sizes):
        end += size
        stop = round(end * WIDTH / max_length)
        line.append(SHADES[place % 2] * (stop - drawn), SAMPLE_STYLES[place % 2])
        drawn = stop
    line.append("·" * (WIDTH - drawn), "dim")
    samples = "sample" if len(sizes) == 1 else "samples"
    line.append(f"  {end:,} tokens, {len(sizes)} {samples}", "dim")
    return line
