"""The desk: where requests come in and wait until the thread that computes takes them.

Everything here may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque

from raytune_ft.errors import ServeError
from raytune_ft.serving.engine import EngineBusyError
from raytune_ft.serving.engines.scribe import Answer

CLOSING = "the endpoint is shutting down"


class Desk:
    """Requests that wait, and how many run."""

    def __init__(self, slots: int, max_waiting: int) -> None:
        """Begin empty.

        Args:
            slots: requests that are answered at a time.
            max_waiting: requests that may wait when all slots are taken.
        """
        self.slots, self._max_waiting = slots, max_waiting
        self.running = 0
        self.closed = False
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()

    def hand_in(self, answer: Answer) -> None:
        """Put a request at the end of the queue; EngineBusyError, ServeError if that cannot be."""
        with self._changed:
            if self.closed:
                raise ServeError(CLOSING)
            free = max(self.slots - self.running, 0)
            if len(self._waiting) >= self._max_waiting + free:
                raise EngineBusyError(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append(answer)
            self._changed.notify()

    def cancel(self, answer: Answer) -> None:
        """Free the place at once when it waits, within one round when it runs."""
        answer.cancelled.set()
        with self._changed:
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Return how many run and how many wait."""
        with self._changed:
            return self.running, len(self._waiting)

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def wait(self) -> bool:
        """Wait for something to do; return False once closed."""
        with self._changed:
            while not (self.closed or self.running or self._waiting):
                self._changed.wait()
            return not self.closed

    def rest(self, seconds: float) -> None:
        """Wait a moment where requests wait for what only others can give back."""
        with self._changed:
            if self._waiting and not self.running and not self.closed:
                self._changed.wait(timeout=seconds)

    def waiting(self) -> list[Answer]:
        """Return those that wait, the first come first; none where all slots are taken."""
        with self._changed:
            return list(self._waiting) if self.running < self.slots else []

    def take(self, answer: Answer) -> bool:
        """Move a request among those that run; False if it is gone."""
        with self._changed:
            if answer not in self._waiting:
                return False
            self._waiting.remove(answer)
            self.running += 1
            return True

    def take_all(self) -> list[Answer]:
        """Move all that wait among those that run."""
        with self._changed:
            taken = list(self._waiting)
            self._waiting.clear()
            self.running += len(taken)
            return taken

    def gone(self) -> None:
        """Count one less that runs."""
        with self._changed:
            self.running -= 1
