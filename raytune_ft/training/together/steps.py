"""Steps of one sequence for several readers: each packed and collated once, whoever is ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from raytune_ft.training.batching import StepData


class SharedSteps:
    """Hands each step of a sequence to every reader, and forgets it behind the last one."""

    def __init__(self, source: Iterator[StepData], begins: Mapping[int, int]) -> None:
        """Read from `source`.

        Args:
            source: the steps from the smallest of `begins` on.
            begins: reader -> steps of the run before its own first one.
        """
        self._source = source
        self._next = dict(begins)
        self._kept: deque[StepData] = deque()
        self._first = min(begins.values(), default=0)

    def of(self, reader: int) -> Iterator[StepData]:
        """Yield a reader's steps."""
        while True:
            place = self._next[reader] - self._first
            while place >= len(self._kept):
                data = next(self._source, None)
                if data is None:
                    return
                self._kept.append(data)
            found = self._kept[place]
            self._next[reader] += 1
            self._forget()
            yield found

    def leave(self, reader: int) -> None:
        """Keep nothing for a reader any more."""
        self._next.pop(reader, None)
        self._forget()

    def _forget(self) -> None:
        while self._kept and self._first < min(self._next.values(), default=self._first + 1):
            self._kept.popleft()
            self._first += 1
