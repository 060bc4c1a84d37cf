"""The types that an Arrow or Parquet file names, looked at before Arrow opens the file.

In: a file's footer or first message. Out: nothing, or DataError for extension types that may run
code when they are rebuilt; ValueError for what is no such file.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from typing import Any

from raytune_ft.data.files.blobs import Blob
from raytune_ft.errors import DataError

MAGIC, PARQUET = b"ARROW1", b"PAR1"
HARMLESS = frozenset({"arrow.json", "arrow.uuid", "arrow.bool8", "arrow.fixed_shape_tensor"})
"""Extension types that Arrow implements in C++."""
_NAME_KEY, _HIDDEN_KEY = b"ARROW:extension:name", b"ARROW:extension:nam_"
"""Equally long, so that one can take the other's place in a schema's bytes."""
_STORED_SCHEMA = re.compile(rb"ARROW:schema(\x18(?:[\x80-\xff]*[\x00-\x7f]))?")
"""Parquet's key for Arrow's schema; behind it a Thrift string: type, length, base64."""
_LENGTH_BYTES = 4


def check_parquet(blob: Blob, display: str) -> None:
    """Look at the Arrow schema that a Parquet file's footer holds, if any."""
    footer = _footer(blob, len(PARQUET))
    for found in _STORED_SCHEMA.finditer(footer):
        if found[1] is None:
            raise DataError(f"{display}: its Arrow schema cannot be read; write the file again")
        _check_types(_stored_schema(footer, found), display)


def check_file(blob: Blob, display: str) -> None:
    """Look at the footer of an Arrow file."""
    if _NAME_KEY in _footer(blob, len(MAGIC)):
        # the footer is no message of its own, so its types cannot be looked at without risk
        raise DataError(f"{display}: has extension types; write plain columns, or Parquet")


def check_stream(source: Any, display: str) -> None:
    """Look at the first message of an Arrow stream, given as Arrow's file."""
    from pyarrow import ipc

    first = ipc.read_message(source)
    if first.type != "schema":
        raise ValueError("it does not begin with a schema")
    _check_types(first.serialize().to_pybytes(), display)


def _footer(blob: Blob, magic_bytes: int) -> bytes:
    """Return what stands before a file's last bytes, its length and its magic word."""
    whole = blob.size
    end = whole - _LENGTH_BYTES - magic_bytes
    (tail,) = blob.read([(max(0, end), whole)])
    size = int.from_bytes(tail[:_LENGTH_BYTES], "little")
    if end - size < 0:
        raise ValueError("it ends in the middle")
    return blob.read([(end - size, end)])[0]


def _stored_schema(footer: bytes, found: re.Match[bytes]) -> bytes:
    size, shift = 0, 0
    for byte in found[1][1:]:
        size, shift = size | (byte & 0x7F) << shift, shift + 7
    try:
        return base64.b64decode(footer[found.end() : found.end() + size], validate=True)
    except binascii.Error as error:
        raise ValueError(f"stored schema: {error}") from None


def _check_types(schema: bytes, display: str) -> None:
    """Raise DataError if a schema names extension types other than Arrow's own.

    Args:
        schema: a serialised schema message; its types are hidden from Arrow before it reads it.
        display: the file's name.
    """
    import pyarrow as pa
    from pyarrow import ipc

    if _NAME_KEY not in schema:
        return
    shown = ipc.read_schema(pa.py_buffer(schema.replace(_NAME_KEY, _HIDDEN_KEY)))
    for field in _fields(shown):
        kind = (field.metadata or {}).get(_HIDDEN_KEY, b"").decode("utf-8", "replace")
        if kind and kind not in HARMLESS:
            raise DataError(
                f"{display}: column '{field.name}' is of the extension type '{kind[:60]}', which "
                "is not read, since such types may run code; write it as a plain column"
            )


def _fields(fields: Iterable[Any]) -> Iterator[Any]:
    """Yield the fields of a schema, those inside of others too."""
    for field in fields:
        yield field
        yield from _fields(field.type.field(place) for place in range(field.type.num_fields))
