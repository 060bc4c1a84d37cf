"""Blobs: the bytes of one file by ranges, wherever the file lies. Readers know no other way."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

CHUNK_BYTES = 16 * 2**20
"""Bytes that a pass over a whole file holds at a time."""


class Blob(Protocol):
    """A file that does not change while a run reads it; picklable, in a few hundred bytes."""

    def __hash__(self) -> int:
        """Be a key, by what names the file."""
        ...

    @property
    def name(self) -> str:
        """The file's name, whose suffix tells its kind."""
        ...

    @property
    def place(self) -> str:
        """Where it lies, as no other file does: its whole path, or its URL without signatures."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def version(self) -> str:
        """What changes when the file does, looked up when asked: size and time, or an ETag.

        Raises:
            DataError: the file is not there any more.
        """
        ...

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end), in the order given.

        Ranges come sorted, and those that touch are already one. A range that goes over the
        file's end gives the bytes that are there.
        """
        ...

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on, about CHUNK_BYTES at a time."""
        ...


@dataclass(frozen=True)
class LocalBlob:
    """A file of this machine."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def place(self) -> str:
        """Its path from the root."""
        return str(self.path.resolve())

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    @property
    def version(self) -> str:
        """Its size and the time of its last change."""
        found = self.path.stat()
        return f"{found.st_size}-{found.st_mtime_ns}"

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end)."""
        with self.path.open("rb", buffering=0) as file:
            return [_read_at(file.fileno(), start, end) for start, end in ranges]

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on."""
        with self.path.open("rb", buffering=0) as file:
            while chunk := _read_at(file.fileno(), start, start + CHUNK_BYTES):
                start += len(chunk)
                yield chunk


def _read_at(handle: int, start: int, end: int) -> bytes:
    """Read [start, end), which the system may give in pieces; fewer bytes only at the end."""
    found = os.pread(handle, end - start, start)
    while len(found) < end - start and (
        more := os.pread(handle, end - start - len(found), start + len(found))
    ):
        found += more
    return found


class BlobFile(io.RawIOBase):
    """A blob as a file that can be read and sought, for libraries that ask for one."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob, self._size, self._place = blob, blob.size, 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought."""
        return True

    def tell(self) -> int:
        """Return the place of the next read, in bytes."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the start, from here or from the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the start of the file")
        self._place = start + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes, or all that are left."""
        end = self._size if size is None or size < 0 else min(self._place + size, self._size)
        if end <= self._place:
            return b""
        (found,) = self._blob.read([(self._place, end)])
        self._place += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return how many bytes."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
