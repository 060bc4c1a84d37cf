"""Home: the actor on the driver's node that holds a run's folder for nodes that lack it.

Blocks of files go in and out; they travel as Ray's objects do. A checkpoint is put together under
another name and is there, whole and flushed, when its manifest is. A sweep's folder holds those of
its trials, each with a writer of its own. Few imports: each costs time in the actor's process.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from raytune_ft import durable
from raytune_ft.storing.steps import CHECKPOINTS, TRIALS
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.run_folder import MANIFEST, RunFolder

PULSES = "stacks"
FAILURES = "failures.jsonl"


class Home:
    """The actor; its methods are called from several nodes at once.

    Args:
        path: of the run's folder.
    """

    def __init__(self, path: str) -> None:
        self.run = RunFolder(path)
        self._writers: defaultdict[str, int] = defaultdict(int)
        self._held: defaultdict[str, ExitStack] = defaultdict(ExitStack)
        self._carried: set[str] = set()
        self._alone: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._listings: dict[str, list[tuple[str, int, str]]] = {}

    def begin(self, *, carried: bool, inside: str = "") -> int:
        """Let a worker write the run from now on; return its number. Earlier ones are refused.

        Args:
            carried: by what it sends here; then this process holds the folder, as a worker that
                is on this node does itself.
            inside: a trial's folder in a sweep's; empty: the run itself.

        Raises:
            CheckpointError: another process writes this folder.
        """
        with self._alone[inside]:  # it may wait for long; other trials go on
            held = self._held[inside]
            if not carried:
                held.close()
            elif inside not in self._carried:
                held.enter_context(only_writer(self.run.path / inside))
            (self._carried.add if carried else self._carried.discard)(inside)
            if carried:  # what a worker was cut off in the middle of
                durable.tidy(self.run.path / inside / CHECKPOINTS)
            # higher than before a restart
            self._writers[inside] = max(self._writers[inside] + 1, time.time_ns())
            return self._writers[inside]

    def names(self, prefix: str) -> list[str]:
        """Return the names of the run's files, but for hidden ones."""
        root = self.run.path / prefix
        found = root.rglob("*") if root.is_dir() else []
        names = (p.relative_to(self.run.path) for p in found if p.is_file())
        return sorted(n.as_posix() for n in names if not any(x.startswith(".") for x in n.parts))

    def read(self, path: str, start: int, size: int) -> bytes:
        """Return a block of a file, of the run's folder if the path is relative."""
        with (self.run.path / path).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def put(self, writer: int, name: str, start: int, block: bytes, *, last: bool) -> None:
        """Take a block of a file; behind its last one the file is there."""
        self._check(writer, name)
        half = self._half(name)
        half.parent.mkdir(parents=True, exist_ok=True)
        with half.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.write(block)
        if last:
            self._place(name, half)

    def delete(self, writer: int, prefix: str) -> None:
        """Remove a file or a folder."""
        self._check(writer, prefix)
        path = self.run.path / prefix
        if path.is_dir():
            durable.drop(path)
        else:
            path.unlink(missing_ok=True)

    def update(self, writer: int, fields: dict[str, Any]) -> None:
        """Change fields of run.json."""
        self._check(writer, self.run.run_json.name)
        with self._lock:
            self.run.update(**fields)

    def add_failure(self, line: str) -> None:
        """Write down what a worker says of its end; any may."""
        with (self.run.path / FAILURES).open("a", encoding="utf-8") as file:
            file.write(line)

    def exchange(self, new: dict[str, bytes | None]) -> dict[str, bytes]:
        """Take files of the watchdogs, None for one that is gone; return all there are."""
        folder = self.run.path / PULSES
        for name, content in new.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
                continue
            folder.mkdir(exist_ok=True)
            half = folder / f"{name}.half_{os.getpid()}"
            half.write_bytes(content)
            half.replace(folder / name)
        with suppress(OSError):  # of a run without a hang nothing is left
            folder.rmdir()
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return {p.name: p.read_bytes() for p in found if p.is_file() and "half" not in p.name}

    def sizes(self, path: str) -> list[tuple[str, int]]:
        """Return names and sizes of a folder's files, or of the one file."""
        return [(name, (_root(path) / name).stat().st_size) for name in _names(path)]

    def listing(self, path: str) -> list[tuple[str, int, str]]:
        """Return the same with each file's sha256, which is read once."""
        with self._lock:
            if path not in self._listings:
                self._listings[path] = [
                    (name, size, _sha256(_root(path) / name)) for name, size in self.sizes(path)
                ]
            return self._listings[path]

    def _check(self, writer: int, name: str) -> None:
        parts = PurePosixPath(name).parts
        inside = "/".join(parts[:2]) if parts[0] == TRIALS else ""
        if writer < self._writers[inside]:
            raise PermissionError("a later start of this run's workers writes it now")

    def _half(self, name: str) -> Path:
        path, parts = self.run.path / name, PurePosixPath(name).parts
        if CHECKPOINTS in parts[:-2]:
            writing = f"{durable.WRITING}{path.parent.name}_{os.getpid()}"
            return path.parents[1] / writing / path.name
        return path.with_name(f".{path.name}.half")

    def _place(self, name: str, half: Path) -> None:
        final = self.run.path / name
        if not half.parent.name.startswith(durable.WRITING):
            half.replace(final)
        elif half.name == MANIFEST:
            durable.publish(half.parent, final.parent)


def _root(path: str) -> Path:
    found = Path(path)
    return found if found.is_dir() else found.parent


def _names(path: str) -> list[str]:
    found = Path(path)
    if found.is_file():
        return [found.name]
    inside = (p for p in sorted(found.rglob("*")) if p.is_file())
    return [p.relative_to(found).as_posix() for p in inside]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
