"""Ranks as plain gloo processes on a tiny network: fast enough to injure many of them.

They are forked off a server that has everything imported, so that a start takes no seconds.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.ranks"])


@dataclass
class Started:
    """One run's ranks."""

    folder: Path
    ranks: list[BaseProcess]

    def wait(self, seconds: float) -> list[int | None]:
        """Return all ranks' exit codes; None of those that are not done in so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return codes

    def printed(self) -> str:
        """Return what the ranks wrote."""
        logs = sorted(self.folder.glob("rank_*.log"))
        return "\n".join(f"{path.name}\n{path.read_text()}" for path in logs)


def start(scenario: str, folder: Path, *, world: int = 2, **values: Any) -> Started:
    """Start ranks, which look `scenario` up in `tests.faults.ranks`."""
    from tests.faults import ranks

    folder.mkdir(parents=True, exist_ok=True)
    told = {"folder": str(folder), "world": world, **values}
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=ranks.main, args=(scenario, rank, told), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Started(folder, processes)
