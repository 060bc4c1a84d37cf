"""Groups of gloo processes that start once and run one cell after the other."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.exact.cells import Cell

START_TIMEOUT_S, TIMEOUT_S = 600, 120
"""Of a group's processes, which import for seconds on a quiet machine; and of a cell."""


class Group:
    """`world` processes; leave it with `close`."""

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, str(folder), theirs), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self._answers("start", START_TIMEOUT_S)

    def run(self, cell: Cell) -> Any:
        """Return rank 0's outcome; RuntimeError with the traceback of the first rank that fails."""
        for pipe in self.pipes:
            pipe.send(cell)
        return self._answers(str(cell), TIMEOUT_S)[0]

    def _answers(self, what: str, timeout_s: float) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            ready = wait([p for i, p in enumerate(self.pipes) if i not in answers], timeout_s)
            if not ready:
                raise RuntimeError(f"ranks {set(range(self.world)) - set(answers)} hang: {what}")
            for pipe in ready:
                number = self.pipes.index(pipe)  # type: ignore[arg-type]
                answers[number], error = pipe.recv()  # type: ignore[union-attr]
                if error is not None:
                    raise RuntimeError(f"rank {number}, {what}:\n{error}")
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


class Groups:
    """One group at a time; the next number of ranks ends the group before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.group: Group | None = None
        self.started = 0

    def run(self, cell: Cell) -> Any:
        """Run a cell on as many ranks as it has; a group that fails is not used again."""
        if self.group is None or self.group.world != cell.world:
            self.close()
            self.started += 1
            folder = self.folder / f"group_{self.started}"
            folder.mkdir()
            self.group = Group(cell.world, folder)
        try:
            return self.group.run(cell)
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        if self.group is not None:
            self.group.close()
        self.group = None


def serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    """Entry of a process: run what comes through the pipe."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as dist

    from tests.exact import runner

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    pipe.send((None, None))
    while True:
        cell = pipe.recv()
        try:
            pipe.send((runner.run(cell, Path(folder), dist.barrier), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
