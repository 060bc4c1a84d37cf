"""Ahead: windows of one kind, made in order a little ahead of the slowest of several readers.

Which windows are made when, what is kept and what is forgotten; `data.feeder` says how they are
made and who reads them. No Ray: references to windows pass through as they are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.errors import TrainingError

AHEAD_WINDOWS = 8
"""Windows made ahead of the slowest rank; one more run of them may be on its way."""
AHEAD_BYTES = 256 * 2**20
"""More is not made ahead, however few windows that is."""
RUN_WINDOWS = 16
"""Windows per Ray Data execution. The next one starts when the last tasks of this one run, so
that its start (0.2 s) is not waited for; a single one over all windows of a large file would
hold a block and a queue entry for each of them."""
BEHIND_WINDOWS = 4
"""Kept behind the slowest rank, for ranks that start again from a checkpoint."""
IN_PROCESS_WINDOWS = 2
"""Epochs of so few windows are made in the actor sooner than Ray Data starts."""
ATTEMPTS = 3
"""Times that Ray Data may fail in a row, for a reason that is not the user's data."""

Made = tuple[Any, int]
"""A reference to a window and its bytes."""
Make = Callable[[Sequence[tuple[int, int]]], Generator[Made, None, None]]
"""Makes windows by their (epoch, number), in this order."""


@dataclass
class _Run:
    """Windows that are being made one after the other."""

    indexes: list[int]
    tables: Callable[[], Generator[Made, None, None]]
    cancelled: bool = False
    left: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = list(self.indexes)


class Line:
    """The windows of one kind, numbered over all epochs, made ahead of the slowest reader.

    Args:
        n_windows: windows of an epoch.
        epochs: none is made beyond them.
        readers: ranks that will ask.
        make: makes windows by their (epoch, number), by Ray Data.
        make_here: the same in this process, for the first window of a start.
        at_once: Ray Data tasks at the same time.
        made: the first windows of epoch 0.
    """

    def __init__(
        self,
        n_windows: int,
        epochs: int,
        readers: int,
        make: Make,
        make_here: Make,
        at_once: int,
        made: Sequence[Made] = (),
    ) -> None:
        self._n_windows, self._end, self._readers = n_windows, n_windows * epochs, readers
        self._make, self._make_here, self._at_once = make, make_here, at_once
        self._changed = threading.Condition()
        self._kept: dict[int, Made] = dict(enumerate(made))
        self._asked: dict[int, int] = {}
        self._runs: list[_Run] = []
        self._next = len(self._kept)
        # of the last window; before the first, as if few filled the room
        self._size = made[-1][1] if made else AHEAD_BYTES // at_once
        self._failures, self._error = 0, ""
        self.made = 0

    def begin(self) -> None:
        """Start to make the first windows, before anybody asks."""
        with self._changed:
            self._start_runs()

    def window(self, reader: int, index: int, timeout: float) -> Made | None:
        """Return a window, or None if it is not made within `timeout` seconds.

        Args:
            reader: the rank that asks; its last question tells what it no longer needs.
            index: epoch * windows of an epoch + window.
            timeout: seconds.

        Raises:
            TrainingError: Ray Data failed again and again.
        """
        with self._changed:
            self._asked[reader] = index
            if not self._comes(index):
                self._go_to(index)
            self._drop_passed()
            self._start_runs()
            self._changed.wait_for(lambda: index in self._kept or self._error, timeout)
            if self._error:
                raise TrainingError(self._error)
            return self._kept.get(index)

    def read_by(self, readers: int) -> None:
        """Have so many readers from now on; nothing waits for the others' questions any more."""
        with self._changed:
            self._readers = readers
            self._asked = {r: index for r, index in self._asked.items() if r < readers}

    def lost(self, index: int) -> None:
        """Forget a window whose node is gone."""
        with self._changed:
            self._kept.pop(index, None)

    def state(self) -> dict[str, Any]:
        """Return what is kept and made, in windows and bytes, for messages and tests."""
        with self._changed:
            return {
                "made": self.made,
                "asked": dict(self._asked),
                "kept": sorted(self._kept),
                "bytes": sum(size for _, size in self._kept.values()),
                "on their way": [index for run in self._runs for index in run.left],
            }

    def _comes(self, index: int) -> bool:
        """Tell whether a window is kept, on its way or the next to be made."""
        coming = any(index in run.left for run in self._runs)
        following = index == self._next and bool(self._runs or self._kept)
        return coming or following or index in self._kept

    def _go_to(self, index: int) -> None:
        """Begin anew at a window; what is kept stays, but what is far ahead."""
        self._cancel()
        last = index + AHEAD_WINDOWS + RUN_WINDOWS
        self._kept = {i: made for i, made in self._kept.items() if i < last}
        self._next = index + 1
        self._start(_Run([index], lambda: self._make_here(self._numbers([index]))))

    def _cancel(self) -> None:
        for run in self._runs:
            run.cancelled = True
        self._runs = []

    def _drop_passed(self) -> None:
        """Let go of windows that every reader has passed."""
        if len(self._asked) < self._readers:
            return
        first = min(self._asked.values()) - BEHIND_WINDOWS
        for index in [index for index in self._kept if index < first]:
            del self._kept[index]

    def _start_runs(self) -> None:
        """Start the next run if its windows are wanted and the one before is nearly done."""
        while self._next in self._kept:
            self._next += 1
        left = sum(len(run.left) for run in self._runs)
        number = self._wanted()
        if self._error or not number or left > self._at_once:
            return
        indexes = [i for i in range(self._next, self._next + number) if i not in self._kept]
        self._next += number
        here = self._n_windows <= IN_PROCESS_WINDOWS
        make = self._make_here if here else self._make
        self._start(_Run(indexes, lambda: make(self._numbers(indexes))))

    def _wanted(self) -> int:
        """Tell how many windows the next run is to make."""
        slowest, fastest = (
            min(self._asked.values(), default=0),
            max(self._asked.values(), default=0),
        )
        ahead = [size for index, (_, size) in self._kept.items() if index > slowest]
        number = min(
            RUN_WINDOWS,
            slowest + AHEAD_WINDOWS + RUN_WINDOWS - self._next,
            (AHEAD_BYTES - sum(ahead)) // max(1, self._size),
        )
        if self._next > slowest + AHEAD_WINDOWS:
            number = 0
        if self._next <= fastest:  # asked for: made whatever is kept
            number = max(number, 1)
        return max(0, min(number, self._end - self._next))

    def _start(self, run: _Run) -> None:
        self._runs.append(run)
        threading.Thread(target=self._work, args=(run,), daemon=True).start()

    def _work(self, run: _Run) -> None:
        """Take what a run makes until it is done or cancelled."""
        try:
            with contextlib.closing(run.tables()) as tables:
                for index, made in zip(run.indexes, tables, strict=True):
                    if not self._take(run, index, made):
                        return
        except Exception as error:
            self._failed(run, error)
        with self._changed:
            if run in self._runs:
                self._runs.remove(run)
            if not run.cancelled:
                self._start_runs()

    def _take(self, run: _Run, index: int, made: Made) -> bool:
        with self._changed:
            if run.cancelled:
                return False
            run.left.remove(index)
            self._kept[index] = made
            self._size = made[1]
            self.made += 1
            self._failures = 0
            self._start_runs()
            self._changed.notify_all()
            return True

    def _failed(self, run: _Run, error: Exception) -> None:
        """Make a run's windows again, unless that has failed too often."""
        with self._changed:
            if run.cancelled or not run.left:
                return
            self._failures += 1
            if self._failures >= ATTEMPTS:
                self._cancel()
                self._error = f"windows failed {ATTEMPTS} times in a row: {last_line(error)}"
                self._changed.notify_all()
            else:
                self._go_to(min(index for each in self._runs for index in each.left))

    def _numbers(self, indexes: Sequence[int]) -> list[tuple[int, int]]:
        return [divmod(index, self._n_windows) for index in indexes]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where nested tracebacks end with the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
