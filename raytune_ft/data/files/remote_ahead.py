"""Rows of several remote files: their bytes fetched side by side before the files are read in turn.

Without that a window with rows of a hundred files would wait for a hundred answers, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raytune_ft.data.files.readers import Offsets, Reader, TextReader
from raytune_ft.data.files.remote_blobs import KEPT_BYTES, RemoteBlob

_AT_ONCE = 16


def fetch_ahead(wanted: Sequence[tuple[Reader, Offsets]]) -> None:
    """Fetch the bytes of rows into this process's cache of blocks, if several files have them.

    Args:
        wanted: readers, each with the numbers of the rows that will be read.

    Raises:
        DataError: of the first file that changed or cannot be read.
    """
    remote = [
        (reader.blob, _ranges(reader, rows))
        for reader, rows in wanted
        if isinstance(reader, TextReader) and isinstance(reader.blob, RemoteBlob)
    ]
    size = sum(end - start for _, ranges in remote for start, end in ranges)
    # more than half would push itself out before it is read
    if len(remote) < 2 or size > KEPT_BYTES // 2:
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda one: one[0].fetch(one[1]), remote))


def _ranges(reader: TextReader, rows: Offsets) -> list[tuple[int, int]]:
    blocks = np.unique(reader.blocks.find_all(rows)[0])
    return [reader.blocks.span(block) for block in blocks.tolist()]
