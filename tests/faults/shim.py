"""A file system that fails at its k-th call: refuses, tears a write, or loses power.

Every call that Python makes through `os` and `io.open` is counted while a `Shim` is active; what
a library writes past Python is not, so what is tested must not write that way.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")
STOPPED = 17
"""Exit code of a child that was stopped."""

RAISING = {"full": errno.ENOSPC, "one_error": errno.EIO, "dead": errno.EIO}
"""Ways to refuse: from the k-th call on nothing can be written; only that call fails; all fail."""
EXITING = ("killed", "torn", "power")
"""Ways to end the process at the k-th call: before it, after half of a write, and so that every
file which was not flushed by then keeps only half of its bytes."""


class Shim:
    """Counts calls; fails from the k-th on in one of the ways. `k` of 0 never fails."""

    def __init__(self, way: str = "none", k: int = 0) -> None:
        self.way, self.k, self.count = way, k, 0
        self.dirty: dict[int, tuple[int, int]] = {}
        """Inode -> (device, inode) of files written to and not flushed since."""
        self.real = {name: getattr(os, name) for name in CALLS}
        self.io_open = io.open

    @contextmanager
    def active(self) -> Iterator[Shim]:
        """Count and fail while the block runs."""
        for name in CALLS:
            setattr(os, name, self._wrapped(name))
        io.open = self._wrapped_open  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name, function in self.real.items():
                setattr(os, name, function)
            io.open = self.io_open

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._step(name, args)
            result = self.real[name](*args, **options)
            self._note(name, args)
            return result

        return call

    def _wrapped_open(self, *args: Any, **options: Any) -> Any:
        self._step("open", args)
        return self.io_open(*args, **options)

    def _step(self, name: str, args: tuple[Any, ...]) -> None:
        self.count += 1
        if not self.k or self.count < self.k:
            return
        if self.way in RAISING:
            passed = self.way == "one_error" and self.count > self.k
            if not passed and not (self.way == "full" and not _takes_room(name, args)):
                code = RAISING[self.way]
                raise OSError(code, os.strerror(code))
        elif self.way in EXITING:
            if self.way == "torn" and name == "write":
                self.real["write"](args[0], args[1][: len(args[1]) // 2])
            if self.way == "power":
                self._lose()
            os._exit(STOPPED)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("write", "fsync"):
            stat = os.fstat(args[0])
            key = (stat.st_dev, stat.st_ino)
            if name == "write":
                self.dirty[stat.st_ino] = key
            else:
                self.dirty.pop(stat.st_ino, None)

    def _lose(self) -> None:
        for path in Path(os.environ["SHIM_ROOT"]).rglob("*"):
            stat = path.stat()
            if self.dirty.get(stat.st_ino) == (stat.st_dev, stat.st_ino) and path.is_file():
                os.truncate(path, stat.st_size // 2)


def _takes_room(name: str, args: tuple[Any, ...]) -> bool:
    """Tell what a full disk refuses: it lets files be read, and names go and change."""
    made = len(args) > 1 and isinstance(args[1], int) and bool(args[1] & os.O_CREAT)
    return name in ("write", "mkdir", "fsync") or (name == "open" and made)


def run_stopped(work: Callable[[], object], root: Path, way: str, k: int) -> bool:
    """Do the work in a child that ends at its k-th call; tell whether it was stopped."""
    process = os.fork()
    if not process:
        os.environ["SHIM_ROOT"] = str(root)
        try:
            with Shim(way, k).active():
                work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, STOPPED), f"call {k}: exit code {code}"
    return code == STOPPED
