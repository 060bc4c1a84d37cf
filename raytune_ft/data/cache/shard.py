"""Shards: what the rows of one window were tokenised to, as the bytes of one file, and back.

A shard is an Arrow IPC stream (any Arrow reader opens it): schema, a batch per BLOCK_ROWS rows,
end. Behind it, where Arrow stops to read, stand the end and the BLAKE2b digest of each of these
sections, and a digest of this table, the run's key and the shard's number. So a few rows are read
without the rest of the file, no byte reaches Arrow before it is verified, and a shard in another's
place is noticed. Files are read, not mapped: a mapped file that loses its end kills the process.

Columns, a row of the window each, in the order of the visit: `row` its number, `kind` one of
EXAMPLE, NO_ANSWER and NOT_KEPT, `uncut` its tokens before the cut, `chosen` those of a pair's
first answer, `ids`, `trained`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.errors import DataError

Numbers = npt.NDArray[np.int64]
Outcome = Example | DataError | None

BLOCK_ROWS = 8
"""Rows read at once: later epochs ask for rows that lie apart."""
EXAMPLE, NO_ANSWER, NOT_KEPT = 0, 1, 2
"""A row that cannot be used is not kept: what is wrong with it names the file, as it lies now."""

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
        pa.field("uncut", pa.int32(), nullable=False),
        pa.field("chosen", pa.int32(), nullable=False),
        pa.field("ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("trained", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
    ]
)
_HEAD = bytes(_SCHEMA.serialize())
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_MAGIC = b"RTTOKEN1"
_DIGEST = 16
_TAIL = struct.Struct(f"<{_DIGEST}sII8s")
"""Digest of the table, sections, rows, magic word."""
_ENTRY = np.dtype([("end", "<u8"), ("digest", f"V{_DIGEST}")])


class DamagedError(Exception):
    """A shard is not as it was written; says what is wrong."""


class Missing:
    """A row that the cache does not have."""


MISSING = Missing()


def shard_bytes(identity: str, rows: Numbers, outcomes: Sequence[Outcome]) -> bytes:
    """Return the file of a window.

    Args:
        identity: the key and the number of the window.
        rows: int64 (w,), the rows' numbers.
        outcomes: what each was encoded to.
    """
    batch = _batch(rows, outcomes)
    blocks = [
        bytes(batch.slice(start, BLOCK_ROWS).serialize())
        for start in range(0, len(rows), BLOCK_ROWS)
    ]
    sections = [_HEAD, *blocks, _END]
    table = np.empty(len(sections), _ENTRY)
    table["end"] = np.cumsum([len(section) for section in sections])
    table["digest"] = [np.void(_digest(section)) for section in sections]
    counts = len(sections), len(rows)
    tail = _TAIL.pack(_table_digest(identity, table.tobytes(), *counts), *counts, _MAGIC)
    return b"".join([*sections, table.tobytes(), tail])


class Shard:
    """A shard's file, open for reading; use it in a `with` statement.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        DamagedError: it is not as it was written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._open(identity)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Shard:
        """Return the shard."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        os.close(self._handle)

    def outcomes(self, rows: Numbers, slots: Numbers) -> list[Outcome | Missing]:
        """Return what rows were encoded to, copied out of the file; MISSING if it is not kept.

        Args:
            rows: int64 (k,), the rows' numbers.
            slots: int64 (k,), their places in the window.

        Raises:
            DamagedError: a byte of their blocks is not as it was written, or other rows stand
                there.
        """
        blocks = np.unique(slots // BLOCK_ROWS)
        places = np.searchsorted(blocks, slots // BLOCK_ROWS) * BLOCK_ROWS + slots % BLOCK_ROWS
        try:
            columns = _Columns(pa.concat_batches([self._block(block) for block in blocks.tolist()]))
            return [
                columns.outcome(place, row)
                for place, row in zip(places.tolist(), rows.tolist(), strict=True)
            ]
        except (pa.ArrowException, ValueError, IndexError) as error:
            raise DamagedError(_first_line(error)) from None

    def _block(self, number: int) -> Any:
        """Read, verify and parse a batch; all but the last have BLOCK_ROWS rows."""
        batch = ipc.read_record_batch(pa.py_buffer(self._section(1 + number)), _SCHEMA)
        batch.validate(full=True)
        if batch.num_rows != min(BLOCK_ROWS, self.n_rows - number * BLOCK_ROWS):
            raise ValueError(f"block {number} has {batch.num_rows} rows")
        return batch

    def _open(self, identity: str) -> None:
        size = os.fstat(self._handle).st_size
        tail = self._read(max(0, size - _TAIL.size), size)
        if len(tail) < _TAIL.size or tail[-len(_MAGIC) :] != _MAGIC:
            raise DamagedError("it does not end as a shard")
        digest, n_sections, n_rows, _ = _TAIL.unpack(tail)
        start = size - _TAIL.size - n_sections * _ENTRY.itemsize
        if start < 0:
            raise DamagedError("its table of sections is longer than the file")
        table = self._read(start, size - _TAIL.size)
        if _table_digest(identity, table, n_sections, n_rows) != digest:
            raise DamagedError("its table of sections is not that of this window")
        entries = np.frombuffer(table, _ENTRY)
        self._ends, self._digests = [0, *entries["end"].tolist()], entries["digest"]
        self.n_rows = int(n_rows)
        if self._ends[-1] != start:
            raise DamagedError("its sections do not fill the file")
        if self._section(0) != _HEAD or self._section(n_sections - 1) != _END:
            raise DamagedError("its columns are not those of a shard")

    def _section(self, number: int) -> bytes:
        """Read a section and verify it."""
        if not 0 <= number < len(self._digests):
            raise DamagedError(f"it has no section {number}")
        found = self._read(self._ends[number], self._ends[number + 1])
        if _digest(found) != self._digests[number].tobytes():
            raise DamagedError(f"bytes {self._ends[number]} to {self._ends[number + 1]} changed")
        return found

    def _read(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._handle, end - start, start)
        except OSError as error:
            raise DamagedError(f"bytes {start} to {end}: {error.strerror}") from None


class _Columns:
    """Verified batches as arrays."""

    def __init__(self, batch: Any) -> None:
        rows, kinds, uncut, chosen, ids, trained = batch.columns
        if any(column.null_count for column in (*batch.columns, ids.values, trained.values)):
            raise ValueError("a value is missing")
        self._rows, self._kinds, self._uncut = rows.to_numpy(), kinds.to_numpy(), uncut.to_numpy()
        self._chosen = chosen.to_numpy()
        self._bounds = ids.offsets.to_numpy()
        if not np.array_equal(self._bounds, trained.offsets.to_numpy()):
            raise ValueError("tokens and labels differ in number")
        self._ids = ids.values.to_numpy()
        self._trained = trained.values.to_numpy(zero_copy_only=False)

    def outcome(self, slot: int, row: int) -> Outcome | Missing:
        """Return what a row was encoded to; ValueError if it is another row's."""
        if self._rows[slot] != row:
            raise ValueError(f"row {self._rows[slot]} stands where row {row} belongs")
        if self._kinds[slot] == NO_ANSWER:
            return None
        if self._kinds[slot] != EXAMPLE:
            return MISSING
        here = slice(int(self._bounds[slot]), int(self._bounds[slot + 1]))
        ids = np.array(self._ids[here], np.int32)
        labels = np.where(self._trained[here], ids, IGNORE_INDEX).astype(np.int32)
        return Example(ids, labels, int(self._uncut[slot]), int(self._chosen[slot]))


def _batch(rows: Numbers, outcomes: Sequence[Outcome]) -> Any:
    kinds = np.array([_kind(outcome) for outcome in outcomes], np.uint8)
    kept = [
        outcome if isinstance(outcome, Example) and kind == EXAMPLE else _NOTHING
        for outcome, kind in zip(outcomes, kinds, strict=True)
    ]
    sizes = [len(example.input_ids) for example in kept]
    ends = pa.array(np.cumsum([0, *sizes]).astype(np.int32))
    ids = np.concatenate([_NOTHING.input_ids, *(example.input_ids for example in kept)])
    labels = np.concatenate([_NOTHING.labels, *(example.labels for example in kept)])
    uncut = np.array([example.uncut_length for example in kept], np.int32)
    columns = [
        pa.array(np.asarray(rows, np.int64)),
        pa.array(kinds),
        pa.array(uncut),
        pa.array(np.array([example.n_chosen for example in kept], np.int32)),
        pa.ListArray.from_arrays(ends, pa.array(ids), type=_SCHEMA.field("ids").type),
        pa.ListArray.from_arrays(
            ends, pa.array(labels != IGNORE_INDEX), type=_SCHEMA.field("trained").type
        ),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


_NOTHING = Example(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)


def _kind(outcome: Outcome) -> int:
    if outcome is None:
        return NO_ANSWER
    if isinstance(outcome, DataError):
        return NOT_KEPT
    # a file keeps whether a token is trained, not its label: a label that is another id would go
    learned = outcome.labels[outcome.labels != IGNORE_INDEX]
    same = np.array_equal(learned, outcome.input_ids[outcome.labels != IGNORE_INDEX])
    return EXAMPLE if same else NOT_KEPT


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _table_digest(identity: str, table: bytes, n_sections: int, n_rows: int) -> bytes:
    return _digest(f"{identity}\0{n_sections}\0{n_rows}\0".encode() + table)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
