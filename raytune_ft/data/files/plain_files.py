"""Plain text files: a row per document, column `text`, to pre-train on.

A file without blank lines has a document per line. In a file with blank lines between its lines,
these divide the documents, and a document keeps its line breaks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raytune_ft.data.files.readers import BOM, DataRow, TextReader, decode, line_spans, text_start
from raytune_ft.errors import DataError


class PlainReader(TextReader):
    """Documents of a text file."""

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Decode one document; DataError if it is not UTF-8."""
        return {"text": decode(raw, where).replace("\r\n", "\n").removesuffix("\r")}


def open_text(path: Path, display: str) -> PlainReader:
    """Find the documents of a text file; DataError if it has none."""
    start = text_start(path, display)
    starts, ends, filled = line_spans(path, len(BOM) if start.startswith(BOM) else 0)
    places = np.flatnonzero(filled)
    if not len(places):
        raise DataError(f"{display}: no rows, only blank lines; write rows into it")
    if len(places) == places[-1] - places[0] + 1:
        return PlainReader(path, display, starts[filled], ends[filled], places + 1)
    opens = np.concatenate([[True], np.diff(places) > 1])
    closes = np.concatenate([opens[1:], [True]])
    first, last = places[opens], places[closes]
    return PlainReader(path, display, starts[first], ends[last], first + 1)
