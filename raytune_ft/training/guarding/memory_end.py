"""Memory's end: whether the system, or Ray for it, kills processes because memory runs out.

A killed process says nothing. What it saw before is told with its pulse, and compared with what is
seen after: kills for memory are counted by the kernel, and Ray kills where little is left.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NEARLY_FULL = 0.9
"""Share in use; Ray kills from 0.95 on (`RAY_memory_usage_threshold`), a second after it looked."""


def kills() -> int:
    """Return how often the kernel has killed for memory, in this container and in the machine."""
    count = 0
    for path in (CGROUP / "memory.events", Path("/proc/vmstat")):
        with suppress(OSError, ValueError):
            lines = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
            count += int(lines.get("oom_kill", 0))
    return count


def share() -> float:
    """Return the share of memory in use, 0 to 1: of the container's, or of the machine's."""
    found = 0.0
    with suppress(OSError, ValueError):
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        found = used / int(limit)  # "max" where there is no limit
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found = max(found, 1 - sizes["MemAvailable"] / sizes["MemTotal"])
    return found


def suspected(before: dict[str, float], after_kills: int) -> bool:
    """Tell whether a process was killed for memory.

    Args:
        before: its `kills()` and `share()` at its last sign of life.
        after_kills: `kills()` by now.
    """
    return after_kills > before["kills"] or before["share"] > NEARLY_FULL
