"""Records of separated values: where they begin in a text, as fast as their quotes allow.

In: the text in chunks. Out: the byte and the line of each record. Lines without quotes are records
and are not parsed; a record with quotes is parsed by Python's `csv`, which decides where it ends.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from raytune_ft.data.files import readers
from raytune_ft.data.files.blocks import Offsets

_BATCH = 65_536
_RUN = 32
"""Fewer lines are looked at one by one."""


class RecordError(ValueError):
    """A record that cannot be read, and the line in which it begins."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_records(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Parse records, with fields as long as a row may be."""
    if csv.field_size_limit() < readers.MAX_ROW_BYTES:
        csv.field_size_limit(readers.MAX_ROW_BYTES)  # the module knows but one limit for all
    return csv.reader(lines, delimiter=separator, strict=True)


def record_starts(
    chunks: Iterable[bytes], skip: int, separator: str
) -> Iterator[tuple[Offsets, Offsets]]:
    """Find the records that are not blank, the header too.

    Args:
        chunks: the text from byte `skip` on, cut anywhere.
        skip: bytes before the first line.
        separator: between fields.

    Yields:
        The byte and the line, from 1, in which records begin, int64 (records,) each.

    Raises:
        RecordError: the quotes of a record are wrong, or a line is too long.
    """
    text = _Text(chunks, skip)
    parser = read_records(text, separator)
    places: list[tuple[int, int]] = []
    while text.more():
        if text.at_mark():
            place = (text.offset, text.line)
            if _parse(parser, text):
                places.append(place)
        elif text.in_short_run():
            places += text.plain_places()
        else:
            yield _columns(places)
            places = []
            yield text.plain_lines()
        if len(places) >= _BATCH:
            yield _columns(places)
            places = []
    yield _columns(places)


def _parse(parser: Iterator[list[str]], text: _Text) -> list[str]:
    first = text.line
    text.begin()
    try:
        return next(parser)
    except csv.Error as error:
        raise RecordError(first, str(error)) from None


def _columns(places: list[tuple[int, int]]) -> tuple[Offsets, Offsets]:
    found = np.array(places, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


class _Text:
    """A text by lines: those with marks (quotes, lone carriage returns) apart from plain ones.

    `offset` and `line` (from 1) are the place in the text up to which it was taken. As an
    iterator it gives the parser the line in which a record begins, then what goes on inside of
    its quotes, up to the next line with a quote, as one line.
    """

    def __init__(self, chunks: Iterable[bytes], skip: int) -> None:
        self._chunks = _whole_lines(chunks)
        self._raw = b""
        self._bounds = np.zeros(1, dtype=np.int64)
        self._marked: list[int] = []
        self._next = self._mark = self._count = 0
        self._begins = True
        self._base, self.line = skip, 1

    @property
    def offset(self) -> int:
        """The byte in which the next line begins."""
        return self._base + int(self._bounds[self._next])

    def more(self) -> bool:
        """Tell whether there is another line; take the next chunk if need be."""
        if self._next < self._count:
            return True
        raw = next(self._chunks, None)
        if raw is None:
            return False
        self._base += len(self._raw)
        self._raw, self._next = raw, 0
        letters = np.frombuffer(raw, np.uint8)
        breaks = np.flatnonzero(letters == ord("\n")) + 1
        self._bounds = np.append(0, breaks)
        if self._bounds[-1] < len(raw):
            self._bounds = np.append(self._bounds, len(raw))
        if np.diff(self._bounds).max() > readers.MAX_ROW_BYTES:
            raise RecordError(
                self.line + int(np.diff(self._bounds).argmax()),
                f"a line of over {readers.MAX_ROW_BYTES // 2**20} MiB",
            )
        marks = np.concatenate([np.flatnonzero(letters == ord('"')), _lone_returns(letters)])
        marked = np.unique(np.searchsorted(self._bounds, marks, side="right") - 1)
        self._marked, self._mark, self._count = marked.tolist(), 0, len(self._bounds) - 1
        return True

    def at_mark(self) -> bool:
        """Tell whether the next line has to be parsed."""
        return self._next == self._next_marked()

    def in_short_run(self) -> bool:
        """Tell whether a line that has to be parsed comes soon."""
        return self._next_marked() - self._next < _RUN

    def plain_places(self) -> list[tuple[int, int]]:
        """Take the lines up to the next with a mark, if they are few, as places."""
        found = []
        for _ in range(self._next, self._next_marked()):
            start, place = self._bounds[self._next], (self.offset, self.line)
            self._take(self._next + 1)
            if self._raw[start : self._bounds[self._next]].rstrip(b"\r\n"):
                found.append(place)
        return found

    def plain_lines(self) -> tuple[Offsets, Offsets]:
        """Take the lines up to the next with a mark; return the byte and number of the filled."""
        stop = self._next_marked()
        bounds = self._bounds[self._next : stop + 1]
        lines = np.arange(self.line, self.line + stop - self._next, dtype=np.int64)
        sizes = np.diff(bounds)
        starts = bounds[:-1]
        letters = np.frombuffer(self._raw, np.uint8)
        blank = (letters[starts] == ord("\n")) | ((letters[starts] == ord("\r")) & (sizes <= 2))
        self._take(stop)
        return starts[~blank] + self._base, lines[~blank]

    def begin(self) -> None:
        """Say that the next line begins a record."""
        self._begins = True

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        if not self.more():
            raise StopIteration
        # a record goes on in another line only inside of quotes
        stop = self._next if self._begins else self._next_marked()
        self._begins = False
        start = int(self._bounds[self._next])
        self._take(min(stop + 1, self._count))
        # other encodings are told when the row is read; the separators are ASCII
        return self._raw[start : self._bounds[self._next]].decode("utf-8", "surrogateescape")

    def _next_marked(self) -> int:
        while self._mark < len(self._marked) and self._marked[self._mark] < self._next:
            self._mark += 1
        return self._marked[self._mark] if self._mark < len(self._marked) else self._count

    def _take(self, stop: int) -> None:
        self.line += stop - self._next
        self._next = stop


def _lone_returns(letters: npt.NDArray[np.uint8]) -> Offsets:
    """Find carriage returns without a line feed behind them, which end a line for the parser."""
    returns: Offsets = np.flatnonzero(letters == ord("\r"))
    lone: Offsets = returns[letters[np.minimum(returns + 1, len(letters) - 1)] != ord("\n")]
    return lone


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a text behind line breaks; a line over the limit is cut as it comes."""
    rest = b""
    for chunk in chunks:
        cut = chunk.rfind(b"\n") + 1
        if not cut and len(rest) <= readers.MAX_ROW_BYTES:
            rest += chunk
            continue
        yield rest + chunk[:cut]
        rest = chunk[cut:]
    if rest:
        yield rest
