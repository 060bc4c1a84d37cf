"""Liveness: which process drives a run, and whether it is still there.

A driver that is killed writes nothing more, so a run's record says who writes it and readers look.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

START_FIELD = 19
"""Index of a process's start time in /proc/PID/stat, behind the command's closing bracket."""


def this_process() -> dict[str, Any]:
    """Describe this process: host, number, and when it began, in the kernel's ticks since boot."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def is_gone(process: dict[str, Any]) -> bool:
    """Tell whether a process has ended; False as well where another host would have to say.

    Args:
        process: as `this_process` described it. A number that went to another process since then
            is told by when that began.
    """
    if process.get("host") != socket.gethostname():
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
    return process.get("host") == socket.gethostname() and not is_gone(process)


def _began(pid: int) -> str | None:
    """Return boot and ticks; None where there is no /proc, "zombie" for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return "zombie" if fields[0] in "ZX" else f"{boot} {fields[START_FIELD]}"
