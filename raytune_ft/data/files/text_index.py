"""The index of a text file: its blocks of rows and its content's hash, from one pass over it.

Large files' indexes are kept in the cache folder, by the file's place, size and time, so that
only the first run reads the whole file before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from raytune_ft.data.files.blobs import Blob
from raytune_ft.data.files.blocks import Blocks
from raytune_ft.data.files.kept import Arrays, kept_arrays
from raytune_ft.errors import DataError

KEPT_BYTES = 8 * 2**20
"""The index of a smaller file is made faster than it is looked up."""
_FORMAT = "1"


@dataclass(frozen=True)
class TextIndex:
    """What is known of a text file; `kind` is one of the numbers that its maker gave."""

    version: str
    fingerprint: str
    blocks: Blocks
    kind: int


def index_text(
    blob: Blob,
    display: str,
    what: str,
    skip: int,
    make: Callable[[Iterator[bytes]], tuple[Blocks, int]],
) -> TextIndex:
    """Return the index of a file.

    Args:
        blob: the file.
        display: its name in messages.
        what: names the way of dividing it.
        skip: bytes before its text.
        make: divides the text, given in chunks, and tells of which kind it is.

    Raises:
        DataError: no rows, or the file changes while it is read.
    """
    version = blob.version

    def pass_over() -> Arrays:
        digest = xxhash.xxh3_128()
        blocks, kind = make(_hashed(blob.chunks(skip), digest))
        if blob.version != version:
            raise DataError(
                f"{display}: changed while it was read; start again when it is complete"
            )
        return {
            **blocks.arrays(),
            "hash": np.frombuffer(digest.digest(), np.uint8),
            "kind": np.array(kind),
        }

    key = ("index", _FORMAT, what, blob.place, version)
    found = pass_over() if blob.size < KEPT_BYTES else kept_arrays(key, pass_over)
    blocks = Blocks.of(found)
    if not blocks.n_rows:
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
    return TextIndex(version, found["hash"].tobytes().hex(), blocks, int(found["kind"]))


def _hashed(chunks: Iterator[bytes], digest: xxhash.xxh3_128) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
