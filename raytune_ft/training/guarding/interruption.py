"""Interruption: whether this process was asked to end by SIGTERM, known in any of its threads.

Python runs signal handlers in the main thread alone, and a training function of Ray Train is in
another one. The interpreter's fault handler acts where the signal arrives, in any thread; what it
writes into a file of ours is the flag.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from types import TracebackType
from typing import IO


class AskedToEnd:
    """While entered, SIGTERM ends nothing; calling it tells whether there was one."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AskedToEnd:
        if hasattr(os, "memfd_create"):  # no disk, so a full one does not matter
            self._file = os.fdopen(os.memfd_create("asked_to_end"), "wb", buffering=0)
        else:
            self._file = tempfile.TemporaryFile(buffering=0)
        faulthandler.register(signal.SIGTERM, file=self._file, all_threads=True, chain=False)
        return self

    def __call__(self) -> bool:
        return self._file is not None and os.fstat(self._file.fileno()).st_size > 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faulthandler.unregister(signal.SIGTERM)
        if self._file is not None:
            self._file.close()
            self._file = None
