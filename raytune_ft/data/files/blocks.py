"""Blocks: where the rows of a text file stand, in about one byte a row.

In: the byte and the line in which each row begins, in order. Out: the same for every 16th row;
those between are found by reading the block. A row that fills much of a block has one of its own,
so a block is at most BLOCK_BYTES, or one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 16
"""Rows of a block where they are divided by line breaks, which are quickly found."""
PARSED_ROWS = 4
"""Rows of a block where they are divided by parsing them (CSV, JSON arrays)."""
BLOCK_BYTES = 256 * 2**10

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows, numbered from 0 to B - 1.

    `starts` int64 (B + 1,): the byte where each begins, and where the last one ends; `rows`
    (B + 1,): rows before each; `lines` (B + 1,): the line, from 1, in which each begins and the
    one behind the last row's first, or None if row r begins in line r + `first_line`.
    """

    starts: Offsets
    rows: npt.NDArray[np.integer[Any]]
    lines: npt.NDArray[np.integer[Any]] | None
    first_line: int

    @property
    def n_rows(self) -> int:
        """Return the number of rows."""
        return int(self.rows[-1])

    def find(self, row: int) -> tuple[int, int]:
        """Return a row's block and its place in there, from 0."""
        # a number of another type would make NumPy copy all of them
        number = self.rows.dtype.type(row)
        block = int(np.searchsorted(self.rows, number, side="right")) - 1
        return block, row - int(self.rows[block])

    def find_all(self, rows: Offsets) -> tuple[Offsets, Offsets]:
        """Return the rows' blocks and places in there, int64 of the same shape."""
        blocks = np.searchsorted(self.rows, rows.astype(self.rows.dtype), side="right") - 1
        return blocks, rows - self.rows[blocks].astype(np.int64)

    def span(self, block: int) -> tuple[int, int]:
        """Return the bytes [start, end) of a block."""
        return int(self.starts[block]), int(self.starts[block + 1])

    def rows_of(self, block: int) -> int:
        """Return the number of rows of a block."""
        return int(self.rows[block + 1]) - int(self.rows[block])

    def lines_of(self, block: int) -> tuple[int, int]:
        """Return the line in which a block begins, and that of the next block."""
        if self.lines is None:
            return (
                int(self.rows[block]) + self.first_line,
                int(self.rows[block + 1]) + self.first_line,
            )
        return int(self.lines[block]), int(self.lines[block + 1])

    def lines_of_all(self, blocks: Offsets) -> tuple[Offsets, npt.NDArray[np.bool_]]:
        """Return the lines in which blocks begin, and whether each has as many lines as rows."""
        rows = np.stack([self.rows[blocks], self.rows[blocks + 1]]).astype(np.int64)
        if self.lines is None:
            return rows[0] + self.first_line, np.ones(len(blocks), dtype=np.bool_)
        lines = np.stack([self.lines[blocks], self.lines[blocks + 1]]).astype(np.int64)
        return lines[0], lines[1] - lines[0] == rows[1] - rows[0]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what is to be written down: differences, in as few bytes as hold them."""
        found = {"starts": _narrowed(self.starts), "rows": _narrowed(self.rows)}
        if self.lines is not None:
            found["lines"] = _narrowed(self.lines)
        first = [int(self.starts[0]), int(self.first_line if self.lines is None else self.lines[0])]
        return {**found, "first": np.array(first, dtype=np.int64)}

    @classmethod
    def of(cls, arrays: dict[str, npt.NDArray[Any]]) -> Blocks:
        """Build blocks from what `arrays` gave; ValueError or KeyError if it is something else."""
        start, line = arrays["first"].tolist()
        lines = arrays.get("lines")
        return cls(
            _widened(arrays["starts"], start),
            _small(_widened(arrays["rows"], 0)),
            None if lines is None else _small(_widened(lines, line)),
            line,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as bytes: a pickled array's head is larger than most files' blocks."""
        flat = [(key, str(a.dtype), a.tobytes()) for key, a in self.arrays().items()]
        return _unpickled, tuple(flat)


class BlockBuilder:
    """Collects rows, in order, as blocks of up to `block_rows`."""

    def __init__(self, block_rows: int = BLOCK_ROWS) -> None:
        self._block_rows = block_rows
        self._large = BLOCK_BYTES // block_rows
        self._start = self._line = np.empty(0, dtype=np.int64)
        self._n_rows, self._was_large = 0, False
        self._parts: list[tuple[Offsets, Offsets, Offsets]] = []

    def add(self, starts: Offsets, lines: Offsets) -> None:
        """Add rows by the byte and the line in which they begin, int64 (rows,) each."""
        starts = np.concatenate([self._start, starts])
        lines = np.concatenate([self._line, lines])
        self._start, self._line = starts[-1:], lines[-1:]
        if len(starts) > 1:
            self._close(starts, lines[:-1])

    def finish(self, end: int) -> Blocks:
        """Return the blocks of a text whose last row ends before byte `end`."""
        if len(self._start):
            self._close(np.append(self._start, end), self._line)
        empty = np.empty(0, dtype=np.int64)
        starts, rows, lines = (
            np.concatenate(part) for part in zip((empty,) * 3, *self._parts, strict=True)
        )
        after = int(self._line[-1]) + 1 if len(self._line) else 1
        rows, lines = np.append(rows, self._n_rows), np.append(lines, after)
        first = int(lines[0])
        even = bool((lines == rows + first).all())
        return Blocks(np.append(starts, end), _small(rows), None if even else _small(lines), first)

    def _close(self, bounds: Offsets, lines: Offsets) -> None:
        """Find blocks among n rows, whose bounds (n + 1,) are known."""
        numbers = np.arange(self._n_rows, self._n_rows + len(lines), dtype=np.int64)
        large = np.diff(bounds) > self._large
        opens = (numbers % self._block_rows == 0) | large
        opens[1:] |= large[:-1]
        opens[0] |= self._was_large
        self._was_large, self._n_rows = bool(large[-1]), self._n_rows + len(lines)
        self._parts.append((bounds[:-1][opens], numbers[opens], lines[opens]))


def filled_lines(chunks: Iterable[bytes], skip: int) -> Iterator[tuple[Offsets, Offsets]]:
    """Find the lines of a text that hold more than white space, in one pass.

    Args:
        chunks: the text from byte `skip` on, cut anywhere.
        skip: bytes before the first line.

    Yields:
        The byte in which lines begin and their numbers from 1, int64 (lines,) each.

    Memory: a few chunks, however long a line is.
    """
    offset, line = skip, 1
    start, filled = skip, False
    for chunk in chunks:
        text = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(text == ord("\n"))
        if not len(breaks):
            filled = filled or not chunk.isspace()
            offset += len(chunk)
            continue
        head, tail = chunk[: breaks[0]], chunk[breaks[-1] + 1 :]
        first = filled or bool(head and not head.isspace())
        found = np.append(first, _filled(chunk, text, breaks))
        starts = np.append(start, breaks[:-1] + (offset + 1))
        yield starts[found], np.flatnonzero(found) + line
        line += len(breaks)
        start, filled = offset + int(breaks[-1]) + 1, bool(tail and not tail.isspace())
        offset += len(chunk)
    if filled:
        yield np.array([start]), np.array([line])


def _filled(chunk: bytes, text: npt.NDArray[np.uint8], breaks: Offsets) -> npt.NDArray[np.bool_]:
    """Tell which of the lines between line breaks hold more than white space."""
    firsts = text[breaks[:-1] + 1]
    filled = firsts > ord(" ")
    for line in np.flatnonzero(~filled & (firsts != ord("\n"))).tolist():
        filled[line] = not chunk[breaks[line] + 1 : breaks[line + 1]].isspace()
    return filled


def _small(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    return values.astype(np.uint32) if len(values) and values[-1] < 2**32 else values


def _narrowed(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    steps = np.diff(values.astype(np.int64))
    return steps.astype(np.min_scalar_type(int(steps.max(initial=0))))


def _widened(steps: npt.NDArray[Any], first: int) -> Offsets:
    values = np.empty(len(steps) + 1, dtype=np.int64)
    values[0] = first
    np.cumsum(steps, out=values[1:])
    values[1:] += first
    return values


def _unpickled(*flat: tuple[str, str, bytes]) -> Blocks:
    return Blocks.of({key: np.frombuffer(raw, dtype=kind) for key, kind, raw in flat})
