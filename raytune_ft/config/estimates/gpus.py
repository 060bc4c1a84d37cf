"""GPUs of this machine and the memory there is, without torch and without touching a GPU.

A process that plans must not hold a CUDA context beside the one that trains, so the driver's own
tool is asked. What is not here is not guessed: a driver of a cluster may have no GPU itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

QUERY = ("--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")
SECONDS = 20
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU that this process may use."""

    name: str
    memory: int
    """Bytes."""
    free: int | None = None
    """Bytes that no process holds; None: the driver does not say."""


def visible() -> list[Gpu]:
    """Return this machine's GPUs that CUDA_VISIBLE_DEVICES leaves; none where is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 the driver's own tool, by its full path
            [tool, *QUERY], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_gpus(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpus(listed: str, chosen: str | None) -> list[Gpu]:
    """Read what nvidia-smi lists: index, uuid, name, MiB and free MiB, a GPU a line.

    Args:
        listed: its output.
        chosen: CUDA_VISIBLE_DEVICES, indices or beginnings of uuids; None: all.
    """
    wanted = None if chosen is None else [one.strip() for one in chosen.split(",") if one.strip()]
    found = []
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5 or not parts[3].isdigit():
            continue
        index, uuid, name, size, free = parts
        if wanted is None or any(one == index or uuid.startswith(one) for one in wanted):
            found.append(Gpu(name, int(size) * MIB, int(free) * MIB if free.isdigit() else None))
    return found
