"""Wish: SIGTERM and Ctrl-C as something to look at, so that what runs can end in good order.

For the main thread, whose handlers Python calls. A second signal raises KeyboardInterrupt there.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 25.0
"""Behind SIGTERM: spot machines and Slurm kill after 30 seconds, and Ray needs some to end."""


class Wish:
    """While entered, the first signal is kept here."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Wish:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._keep) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def is_late(self) -> bool:
        """Whether the sender will not wait any longer; a person at a keyboard always does."""
        return self.signal == signal.SIGTERM and time.monotonic() - self.since > GRACE_S

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal, self.since = number, time.monotonic()
