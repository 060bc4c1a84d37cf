"""Exclusive: one process at a time writes a run folder.

A killed driver's worker may live on for a moment, and would write into a run that goes on already.
The system takes the lock back when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_ft.errors import CheckpointError

LOCK = ".lock"
PATIENCE_S = 60.0
"""Longer than a worker lives behind its driver."""
POLL_S = 0.05


@contextmanager
def only_writer(
    folder: Path, *, wanted: bool = True, patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Hold a run folder while the block runs; wait for a process that holds it.

    Args:
        folder: of the run; made if it is not there.
        wanted: False does nothing, for ranks that write nothing.
        patience_s: seconds to wait.

    Raises:
        CheckpointError: it is held for longer.
    """
    if not wanted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, folder, time.monotonic() + patience_s)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder}: another process trains this run; wait until it ends, or end it"
                ) from None
            time.sleep(POLL_S)
        else:
            return
