"""Tail: the lines of a file that somebody writes, as they come; also one that is cut and goes on.

A run that is taken up again drops the lines of the steps that it takes again. So the last line
shown must still stand where it stood; where it does not, the file is read on behind the last line
of those shown that does. That needs no inode, which an object store has none of.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from raytune_ft.lookout.seen import Files

BLOCK_BYTES = 1 << 20
REMEMBERED = 4096
"""Lines shown last, among which the place is looked for from which a file goes on."""
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Tail:
    """Reads one file.

    Args:
        files: of the run.
        name: of the file, which may be still to come.
        last: lines before its present end to begin with; None: all.
    """

    def __init__(self, files: Files, name: str, last: int | None = None) -> None:
        self.files, self.name, self.last = files, name, last
        self.n_cuts = 0
        """How often the file was found cut."""
        self._stamp: tuple[int, float] | None = None
        self._at = -1
        self._shown: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED)

    @property
    def has_begun(self) -> bool:
        """Whether the file was there at the last call."""
        return self._at >= 0

    def new(self) -> Iterator[str]:
        """Yield the whole lines that came since the last call."""
        stamp = self.files.stamp(self.name)
        if stamp is None or stamp == self._stamp:
            return
        if self._at < 0:
            self._at = self._beginning(stamp[0])
        elif not self._stands():
            self._go_back(stamp[0])
        yield from self._lines()
        self._stamp = stamp

    def rest(self) -> str:
        """Return what stands behind the last whole line, of a file that nobody writes any more."""
        if self._at < 0 or self.files.stamp(self.name) is None:
            return ""
        return _text(self.files.part(self.name, self._at, BLOCK_BYTES))

    def _lines(self) -> Iterator[str]:
        while block := self.files.part(self.name, self._at, BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            if not end and len(block) < BLOCK_BYTES:
                return
            for line in _LINE.findall(block[: end or len(block)]):
                self._shown.append((self._at, line))
                self._at += len(line)
                yield _text(line)

    def _stands(self) -> bool:
        if not self._shown:
            return True
        start, line = self._shown[-1]
        return self.files.part(self.name, start, len(line)) == line

    def _go_back(self, size: int) -> None:
        """Move to behind the last of the lines shown that is still there."""
        self.n_cuts += 1
        first = self._shown[0][0]
        there = self.files.part(self.name, first, self._at - first)
        while self._shown:
            start, line = self._shown[-1]
            if there[start - first :].startswith(line):
                self._at = start + len(line)
                return
            self._shown.pop()
        self._at = self._beginning(size)  # all of it is new, as far as can be told

    def _beginning(self, size: int) -> int:
        """Return where the last lines begin; the end counts, whole line or not."""
        if self.last is None:
            return 0
        at, found = size, 0
        while at > 0:
            start = max(0, at - BLOCK_BYTES)
            block = self.files.part(self.name, start, at - start)
            place = len(block)
            while (place := block.rfind(b"\n", 0, place)) >= 0:
                found += 1
                if found > self.last:
                    return start + place + 1
            at = start
        return 0


def clean(line: str) -> str:
    """Return a line without what would steer the terminal it is shown on.

    Colours go; of a bar that is drawn again and again, its last state is left.
    """
    plain = COLOURS.sub("", line).expandtabs(4).rpartition("\r")[2]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")
