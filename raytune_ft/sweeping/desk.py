"""Desk: the actor between a sweep's driver and its groups of trials on one base.

In a module that imports nothing of ours: its process would import what else stands here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


class Desk:
    """Carries what trials say to the driver, and what it says of them back."""

    def __init__(self) -> None:
        self.events: list[tuple[int, dict[str, Any]]] = []
        self.over: set[int] = set()
        self._read = 0
        self._added = 0
        self._answered = asyncio.Condition()

    async def tell(self, number: int, event: dict[str, Any], *, waits: bool) -> bool:
        """Tell a trial's step; return whether it goes on, as far as is known.

        With `waits` it is known what the driver makes of this very step.
        """
        self.events.append((number, event))
        self._added += 1
        mine = self._added
        if waits:
            async with self._answered:
                await self._answered.wait_for(lambda: self._read >= mine)
        return number not in self.over

    async def take(self) -> list[tuple[int, dict[str, Any]]]:
        """Hand over all events since the last call, which `answer` has to follow."""
        events, self.events = self.events, []
        return events

    async def answer(self, count: int, over: Sequence[int]) -> None:
        """Say that `count` more events were read, and which trials are over by now."""
        async with self._answered:
            self._read += count
            self.over |= set(over)
            self._answered.notify_all()
