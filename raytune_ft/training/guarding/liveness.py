"""Liveness: which process drives a run, and whether it is still there.

A driver that is killed writes nothing more, so a run's record says who writes it and readers look.
Where that process is another machine's, its signs of life (`attending`) decide.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

START_FIELD = 19
"""Index of a process's start time in /proc/PID/stat, behind the command's closing bracket."""
ALIVE = "alive.json"
"""The driver's last sign of life."""
BEAT_S = 20.0
"""Between two of them."""
SILENT_S = 120.0
"""Without one, behind which a driver elsewhere counts as gone: five may be lost or late, and the
clocks of two machines may differ by some seconds."""


def this_process() -> dict[str, Any]:
    """Describe this process: host, number, and when it began, in the kernel's ticks since boot.

    And whose number it is, for containers that have numbers of their own under a host's name.
    """
    return {
        "host": socket.gethostname(), "numbers": _numbers(), "pid": os.getpid(),
        "began": _began(os.getpid()),
    }  # fmt: skip


def is_gone(process: dict[str, Any]) -> bool:
    """Tell whether a process has ended; False as well where another host would have to say.

    Args:
        process: as `this_process` described it. A number that went to another process since then
            is told by when that began.
    """
    if not can_be_seen(process):
        return False
    pid = int(process["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is somebody else's
        pass
    began = _began(pid)
    return began is not None and began != process.get("began")


def is_here(process: dict[str, Any]) -> bool:
    """Tell whether a process of this machine, as `this_process` described it, is at work."""
    return can_be_seen(process) and not is_gone(process)


def is_silent(process: dict[str, Any], alive: object) -> bool:
    """Tell whether a process of another machine has said its end, or nothing for too long.

    Args:
        process: as it described itself by `this_process`.
        alive: content of the run's `alive.json`. None, or the sign of another process, tells
            nothing: False.
    """
    if can_be_seen(process) or not isinstance(alive, dict) or alive.get("driver") != process:
        return False
    return not _is_fresh(alive)


def at_work(alive: object) -> dict[str, Any] | None:
    """Return the process that gave a sign of life, if it is still there; None if it is not.

    Args:
        alive: content of a run's `alive.json`; None: there is none.
    """
    process = alive.get("driver") if isinstance(alive, dict) else None
    if not isinstance(alive, dict) or not isinstance(process, dict) or alive.get("over"):
        return None
    lives = is_here(process) if can_be_seen(process) else _is_fresh(alive)
    return process if lives else None


def _is_fresh(alive: dict[str, Any]) -> bool:
    said = alive.get("time")
    is_late = not isinstance(said, int | float) or time.time() - said > SILENT_S
    return not (is_late or alive.get("over"))


def send(process: dict[str, Any], number: signal.Signals) -> None:
    """Send a signal to a process of this machine, and to no other that got its number meanwhile.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it is another user's.
    """
    pid = int(process["pid"])
    if not hasattr(os, "pidfd_open"):  # no Linux: the number may change hands between two lines
        if not is_here(process):
            raise ProcessLookupError(pid)
        os.kill(pid, number)
        return
    descriptor = os.pidfd_open(pid)  # from here on it is this process or none
    try:
        if not is_here(process):
            raise ProcessLookupError(pid)
        signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


def can_be_seen(process: dict[str, Any]) -> bool:
    """Tell whether a process's number can be looked up here, should it still be there."""
    numbers = process.get("numbers")
    same = numbers is None or numbers == _numbers()
    return same and process.get("host") == socket.gethostname()


def _numbers() -> str | None:
    """Name the room of numbers that this process is in; None where there is no /proc."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """Return boot and ticks; None where there is no /proc, "zombie" for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return "zombie" if fields[0] in "ZX" else f"{boot} {fields[START_FIELD]}"
