"""Last words: one line on the terminal for a process that ends without a word of its own.

Nothing in a process can speak for it where a kernel short of memory kills it, or Ray's core ends it
by `_Exit(1)`; a small process beside it can.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

DONE = b"."
"""What a process sends that has left the block, however it did."""

SHOW_CURSOR = "\r\n\x1b[?25h"
"""Below the bars, which hide it."""


@contextmanager
def spoken_for(words: Callable[[], str], descriptor: int) -> Iterator[Callable[[], None]]:
    """Have `words()` written to a file descriptor if this process ends inside the block.

    Yields what calls that off, for a process that ends there with words of its own. To be entered
    before other threads begin: it forks.

    Args:
        words: one line; called in the small process, which must not compute.
        descriptor: of the terminal.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _listen(reading, writing, words, descriptor)
    os.close(reading)

    def call_off() -> None:
        with suppress(BrokenPipeError):  # whoever listened was killed
            os.write(writing, DONE)

    try:
        yield call_off
    finally:
        call_off()
        os.close(writing)
        os.waitpid(pid, 0)


def _listen(reading: int, writing: int, words: Callable[[], str], descriptor: int) -> None:
    """Wait for the end of the process that holds the other end; never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.close(writing)
        if os.read(reading, 1) != DONE:
            cursor = SHOW_CURSOR if os.isatty(descriptor) else ""
            os.write(descriptor, f"{cursor}{words()}\n".encode())
    finally:
        os._exit(0)
