"""Blobs: the bytes of one file by ranges, wherever the file lies. Readers know no other way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 16 * 2**20


class Blob(Protocol):
    """A file that does not change while a run reads it; picklable."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def version(self) -> str:
        """What changes when the file does, cheap to find out: its size, time or ETag."""
        ...

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, end), in the order given."""
        ...

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on, about CHUNK_BYTES at a time."""
        ...


@dataclass(frozen=True)
class LocalBlob:
    """A file of this machine."""

    path: Path

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
        found = []
        with self.path.open("rb") as file:
            for start, end in ranges:
                file.seek(start)
                found.append(file.read(end - start))
        return found

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `start` on."""
        with self.path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
