"""Mailbox: the actor between a run's driver and its workers.

In a module that imports nothing: its process would import what else stands here, seconds of CPU
in every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Mailbox:
    """Carries the job and the wish to stop to the workers, rank 0's events to the driver."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.asked = False
        self.room = self.vain = self.grown_from = 0
        self.grows = False
        self.job: Sequence[Any] = ()

    def give(self, job: Sequence[Any]) -> None:
        """Keep what the workers are to do, for those that are started again as well.

        Args:
            job: a reference to it in a list, so that it is not unpickled here.
        """
        self.job = job

    def told(self) -> Sequence[Any]:
        """Return it; empty as long as the driver does not know it."""
        return self.job

    def stop(self) -> None:
        """Ask the workers to stop."""
        self.asked = True

    def has_room(self, workers: int) -> None:
        """Keep for how many workers there is room; what was in vain may be tried again then."""
        if workers != self.room:
            self.room, self.vain = workers, 0

    def begin(self, workers: int) -> None:
        """Note with how many workers a start begins: no more than before, and it was in vain."""
        if 0 < workers <= self.grown_from:
            self.vain = self.room
        self.grown_from = 0

    def wishes(self, workers: int) -> tuple[bool, bool]:
        """Tell whether so many workers are to stop, and whether there could be more of them."""
        return self.asked, self.room > workers and self.room != self.vain

    def grow(self, workers: int) -> None:
        """Note that so many have ended behind a checkpoint, to be started again as more."""
        self.grown_from, self.grows = workers, True

    def growing(self) -> bool:
        """Tell whether they have, since the last call."""
        grows, self.grows = self.grows, False
        return grows

    def put(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Hand over all events since the last call."""
        events, self.events = self.events, []
        return events
