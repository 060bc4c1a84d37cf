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

    def stopping(self) -> bool:
        """Tell whether they were asked to."""
        return self.asked

    def put(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Hand over all events since the last call."""
        events, self.events = self.events, []
        return events
