"""Home folder: the folder that an actor on the driver's node holds, as `places.Folder` has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from raytune_ft.errors import CheckpointError, RaytuneError
from raytune_ft.storing.places import BLOCK_BYTES, Beat

ANSWERS_IN_S = 90.0
"""A link may be cut for a while."""


class HomeFolder:
    """The driver's folder as a `places.Folder`, for the one worker that writes it.

    Args:
        home: the actor.
        writer: as `Home.begin` returned it; 0 reads alone.
        inside: a trial's folder in a sweep's; empty: the run itself.
    """

    def __init__(self, home: Any, writer: int = 0, inside: str = "") -> None:
        self.home, self.writer = home, writer
        self._above = f"{inside}/" if inside else ""

    def names(self, prefix: str = "") -> list[str]:
        found: list[str] = asked(self.home.names.remote(self._above + prefix))
        return [name[len(self._above) :] for name in found]

    def read(self, name: str) -> bytes:
        return b"".join(self._blocks(name))

    def write(self, name: str, content: bytes) -> None:
        asked(self.home.put.remote(self.writer, self._above + name, 0, content, last=True))

    def send(self, local: Path, name: str, beat: Beat = lambda _: None) -> None:
        start = 0
        with local.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                block = file.read(min(BLOCK_BYTES, size - start))
                last = start + len(block) >= size or not block
                there = self._above + name
                asked(self.home.put.remote(self.writer, there, start, block, last=last))
                start += len(block)
                beat(len(block))
                if last:
                    return

    def fetch(self, name: str, local: Path, beat: Beat = lambda _: None) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as file:
            for block in self._blocks(name):
                file.write(block)
                beat(len(block))

    def delete(self, prefix: str) -> None:
        asked(self.home.delete.remote(self.writer, self._above + prefix))

    def _blocks(self, name: str) -> Iterator[bytes]:
        start, there = 0, self._above + name
        while block := asked(self.home.read.remote(there, start, BLOCK_BYTES)):
            yield block
            start += len(block)
            if len(block) < BLOCK_BYTES:
                return


def asked(ref: Any, seconds: float = ANSWERS_IN_S) -> Any:
    """Wait for an answer of the driver's node; CheckpointError, one line, if none comes."""
    try:
        return ray.get(ref, timeout=seconds)
    except FileNotFoundError:
        raise
    except (ray.exceptions.RayError, OSError) as error:
        if isinstance(cause := getattr(error, "cause", None), RaytuneError | PermissionError):
            raise CheckpointError(str(cause)) from None
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise CheckpointError(f"the driver's node does not answer: {reason}") from None
