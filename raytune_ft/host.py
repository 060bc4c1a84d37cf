"""Host: what of this machine a process may use, be it a container or bound to some cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the cores that this process may use at a time, at least one.

    `os.cpu_count` tells what the machine has. A process may be bound to some of them (taskset, a
    batch system's cpuset), and a container has a quota of time; twice as many threads as cores
    take longer than half as many.
    """
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        bound = os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def memory() -> int | None:
    """Return the bytes of memory that this machine, or this container of it, has; None: unknown."""
    sizes = [_memory_limit(), _installed()]
    return min((size for size in sizes if size is not None), default=None)


def _quota() -> float | None:
    """Return the cores' worth of time that a container may take; None: no limit."""
    words = _read("cpu.max").split()  # of cgroup 2: microseconds a period, and the period's
    if len(words) != 2:
        words = [_read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")]
    if not all(word.isdigit() and int(word) for word in words):
        return None
    return int(words[0]) / int(words[1])


def _memory_limit() -> int | None:
    text = _read("memory.max") or _read("memory/memory.limit_in_bytes")
    return int(text) if text.isdigit() else None


def _installed() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _read(name: str) -> str:
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
