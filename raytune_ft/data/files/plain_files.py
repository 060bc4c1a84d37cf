"""Plain text files: a row per document, column `text`, to pre-train on.

A file without blank lines has a document per line. In a file with blank lines between its lines,
these divide the documents, and a document keeps its line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raytune_ft.data.files.blobs import Blob
from raytune_ft.data.files.blocks import BlockBuilder, Blocks, filled_lines
from raytune_ft.data.files.readers import (
    DataRow,
    Part,
    TextReader,
    decode,
    filled_parts,
    text_start,
)
from raytune_ft.data.files.text_index import index_text

_LINES, _PARAGRAPHS = 0, 1


@dataclass(frozen=True)
class PlainReader(TextReader):
    """Documents of a text file: its lines, or what blank lines divide."""

    paragraphs: bool

    def parse(self, raw: bytes, where: str) -> DataRow:
        """Decode one document; DataError if it is not UTF-8."""
        return {"text": decode(raw, where).replace("\r\n", "\n").removesuffix("\r")}

    def divide(self, raw: bytes) -> list[Part]:
        """Divide a block into its documents."""
        lines = filled_parts(raw)
        if not self.paragraphs:
            return lines
        documents: list[list[bytes]] = []
        opens: list[int] = []
        last = -2
        for text, line in lines:
            if line > last + 1:
                documents.append([])
                opens.append(line)
            documents[-1].append(text)
            last = line
        return list(zip((b"\n".join(lines) for lines in documents), opens, strict=True))


def open_text(blob: Blob, display: str) -> PlainReader:
    """Find the documents of a text file; DataError if it has none."""
    _, skip = text_start(blob, display)

    def divide(chunks: Iterator[bytes]) -> tuple[Blocks, int]:
        return _divide(chunks, skip, blob.size)

    index = index_text(blob, display, "text", skip, divide)
    return PlainReader(
        blob, display, index.version, index.fingerprint, index.blocks, index.kind == _PARAGRAPHS
    )


def _divide(chunks: Iterator[bytes], skip: int, end: int) -> tuple[Blocks, int]:
    """Divide a text both ways, until it is known which one it has."""
    lines, paragraphs = BlockBuilder(), BlockBuilder()
    last = None
    broken = False
    for starts, numbers in filled_lines(chunks, skip):
        if not len(numbers):
            continue
        opens = np.diff(numbers, prepend=numbers[0] - 2 if last is None else last) > 1
        broken = broken or (bool(opens[1:].any()) if last is None else bool(opens.any()))
        last = numbers[-1]
        paragraphs.add(starts[opens], numbers[opens])
        if not broken:
            lines.add(starts, numbers)
    if broken:
        return paragraphs.finish(end), _PARAGRAPHS
    return lines.finish(end), _LINES
