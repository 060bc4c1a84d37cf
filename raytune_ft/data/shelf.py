"""Shelf: windows of one kind, made once for readers that come and go at their own pace.

The trials of a sweep read the same windows, each from its first one, many at a time. `ahead.Line`
follows the slowest of readers that go together; a shelf keeps what was made until it holds too
much, and makes ahead of whoever asked last.
"""

from __future__ import annotations

from raytune_ft.data.ahead import AHEAD_WINDOWS, IN_PROCESS_WINDOWS, Line, Made, _Run

KEPT_BYTES = 4 * 2**30
"""Windows beyond are forgotten, those that were not asked for the longest first, and made again
where they are asked for. They lie in Ray's object store, which moves to disk what does not fit."""


class Shelf(Line):
    """`Line` for readers that begin and end when they like; `readers` counts nothing here."""

    kept_bytes = KEPT_BYTES

    def window(self, reader: int, index: int, timeout: float) -> Made | None:
        """Return a window as `Line.window` does; who asks does not matter."""
        made = super().window(0, index, timeout)
        with self._changed:
            if index in self._kept:
                self._kept[index] = self._kept.pop(index)  # the newest of those that are used
        return made

    def _comes(self, index: int) -> bool:
        return index in self._kept or self._is_coming(index)

    def _is_coming(self, index: int) -> bool:
        return any(index in run.left for run in self._runs)

    def _go_to(self, index: int) -> None:
        """Make one window; what is on its way for others stays so."""
        self._runs = [run for run in self._runs if index not in run.left]
        self._start(_Run([index], lambda: self._make_here(self._numbers([index]))))

    def _drop_passed(self) -> None:
        held = sum(size for _, size in self._kept.values())
        for index in [index for index in self._kept if index != self._asked.get(0)]:
            if held <= self.kept_bytes:
                return
            held -= self._kept.pop(index)[1]

    def _start_runs(self) -> None:
        """Make what follows in the epoch of the last question, when nothing else is on its way.

        Not beyond the epoch: of later ones only the order is new, where `data.cache` has kept the
        tokens of all rows of the first.
        """
        if self._error or any(run.left for run in self._runs):
            return
        asked = self._asked.get(0, -1)
        end = min((max(asked, 0) // self._n_windows + 1) * self._n_windows, self._end)
        ahead = range(asked + 1, min(asked + 1 + AHEAD_WINDOWS, end))
        indexes = [index for index in ahead if index not in self._kept]
        room = max(1, (self.kept_bytes // 2) // max(1, self._size))
        if not indexes:
            return
        indexes = indexes[:room]
        here = self._n_windows <= IN_PROCESS_WINDOWS
        make = self._make_here if here else self._make
        self._start(_Run(indexes, lambda: make(self._numbers(indexes))))
