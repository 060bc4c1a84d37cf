"""Lost Ray: a run whose raylet or control service dies ends at once, and says how to go on.

Ray's core ends a driver without a word, with exit code 1, as soon as it asks a raylet or an object
store that is gone (`QuickExit` in its connection.cc and core_worker.cc); a driver that asks for
nothing waits until health checks fail. So what dies first is watched here. A driver that asks at
that very moment is ended before it can be told, and so is one of a cluster that was joined, whose
processes are another's: `resume.unheard` is what `last_words` says for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from raytune_ft.errors import Interrupted
from raytune_ft.new_run import removed_unless_started
from raytune_ft.resume import lost
from raytune_ft.screen import Screen
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching import reporting

WATCHED = {"raylet": "its raylet ended", "gcs_server": "its control service ended"}
"""Name of a process as the kernel has it, and what is said of it."""
PARENT_FIELD = 1
"""Index of the parent in /proc/PID/stat, behind the command's closing bracket."""


@contextmanager
def seen_to_the_end(
    folder: RunFolder, shown: str, screen: Screen, terminal: TextIO, call_off: Callable[[], None]
) -> Iterator[None]:
    """Whatever ends the Ray that is there while the block runs, the user is told how to go on.

    Args:
        folder: of the run.
        shown: its path as a person would type it.
        screen: to be closed before the last line.
        terminal: gets that line.
        call_off: of `last_words.spoken_for`, since this process speaks for itself then.
    """

    def end(why: str) -> None:
        call_off()
        leave(folder, shown, why, screen, terminal)

    with ending_with_ray(end):
        yield


@contextmanager
def ending_with_ray(end: Callable[[str], None]) -> Iterator[None]:
    """Call `end`, which leaves the process, if a Ray that was started here dies meanwhile.

    Args:
        end: gets what has died; called in a thread of its own, while a block that is being left
            waits for it.
    """
    lock, left = threading.Lock(), threading.Event()

    def watch(pid: int, what: str) -> None:
        with suppress(ChildProcessError):  # Ray has taken its status already
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with lock:
            if not left.is_set():
                end(what)

    for pid, name in children():
        if name in WATCHED:
            threading.Thread(
                target=watch, args=(pid, WATCHED[name]), name=f"lost-ray {name}", daemon=True
            ).start()
    try:
        yield
    finally:
        with lock:
            left.set()


def children() -> list[tuple[int, str]]:
    """List number and name of this process's children; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            before, _, behind = path.read_text(errors="replace").rpartition(")")
            if int(behind.split()[PARENT_FIELD]) == os.getpid():
                found.append((int(path.parent.name), before.partition("(")[2]))
    return found


def leave(folder: RunFolder, shown: str, reason: str, screen: Screen, terminal: TextIO) -> None:
    """Leave this process as a run does whose Ray was lost: one line, record, report, exit code.

    Nothing of Ray is asked for any more: its children end with this process. The line comes first,
    since Ray's core may end the process at any moment.
    """
    told = lost(folder, shown, reason)
    screen.close()
    print(told if isinstance(told, Interrupted) else f"error: {told}", file=terminal, flush=True)
    try:
        with removed_unless_started(folder), reporting.left_with_report(folder):
            raise told
    finally:
        os._exit(told.exit_code)
