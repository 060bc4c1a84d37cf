"""What `inspect` shows, as plain values; the terminal and the page draw the same ones.

Shapes: n = tokens of one row, S = samples in one pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raytune_ft.chat.text import printable
from raytune_ft.data.encode import IGNORE_INDEX
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer

BARS = 12
"""Bars of the histogram."""
_ROUND = (1, 2, 5)

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's tokens that is of one kind."""

    text: str
    trained: bool
    special: bool
    """One special token, such as an end of turn."""


@dataclass(frozen=True)
class RowView:
    """One row, from its columns to its tokens."""

    where: str
    """`file.jsonl:12`."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(role, text)"""
    pieces: list[Piece] = field(default_factory=list)
    n_tokens: int = 0
    n_targets: int = 0
    uncut_length: int = 0
    dropped: str | None = None
    """Why the row is not trained on; None if it is."""


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram: rows with `first` to `last` tokens."""

    first: int
    last: int
    rows: int

    @property
    def label(self) -> str:
        """Name the bar: `100 to 199`, or one number."""
        if self.first == self.last:
            return f"{self.first:,}"
        return f"{self.first:,} to {self.last:,}"


@dataclass(frozen=True)
class View:
    """Everything that is shown."""

    title: str
    formats: list[tuple[str, str]]
    """(source, what it was recognised as and why)"""
    rows: list[RowView]
    packs: list[list[int]]
    """Sizes of the samples, (S,), of the first packs."""
    bars: list[Bar]
    max_length: int
    counts: list[tuple[str, str]]
    """Names and figures: rows, drops with their places, tokens, packs."""
    sampled: str = ""
    """Which rows lengths and figures come from, if not from all: `4,096 of 1,000,000 rows`."""

    @property
    def lengths_title(self) -> str:
        """Head the histogram."""
        return f"Tokens per row, {self.sampled}" if self.sampled else "Tokens per row"


def pieces_of(input_ids: Ints, labels: Ints, tokenizer: TextTokenizer) -> list[Piece]:
    """Cut a row's tokens, both (n,), where trained and untrained meet and at special tokens."""
    special = set(tokenizer.special_tokens.values())
    pieces = []
    for ids, trained in stretches(input_ids, labels):
        for run, is_special in _runs(ids, special):
            text = printable(tokenizer.decode(run, skip_special_tokens=False))
            pieces.append(Piece(text, trained, is_special))
    return pieces


def stretches(input_ids: Ints, labels: Ints) -> Iterator[tuple[list[int], bool]]:
    """Cut token ids, shape (n,), where trained and untrained ones meet."""
    trained = labels != IGNORE_INDEX
    ends = [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(input_ids)]
    start = 0
    for end in ends:
        if end > start:
            yield input_ids[start:end].tolist(), bool(trained[start])
        start = end


def _runs(ids: Sequence[int], special: set[int]) -> Iterator[tuple[list[int], bool]]:
    """Yield special tokens one by one, and what stands between them."""
    run: list[int] = []
    for id_ in ids:
        if id_ not in special:
            run.append(id_)
            continue
        if run:
            yield run, False
        yield [id_], True
        run = []
    if run:
        yield run, False


def bars_of(lengths: Ints) -> list[Bar]:
    """Count rows by their tokens, in at most BARS bars of a round width; none without rows."""
    used = lengths[lengths > 0]
    if not len(used):
        return []
    low, high = int(used.min()), int(used.max())
    width = _round_width(low, high)
    first = low // width
    counts = np.bincount(used // width - first)
    return [
        Bar(max(1, (first + place) * width), (first + place + 1) * width - 1, int(count))
        for place, count in enumerate(counts)
    ]


def _round_width(low: int, high: int) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50 ... with which BARS bars reach from end to end."""
    scale = 1
    while True:
        for step in _ROUND:
            width = step * scale
            if high // width - low // width < BARS:
                return width
        scale *= 10
