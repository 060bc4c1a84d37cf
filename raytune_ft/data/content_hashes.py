"""Content hashes: equal rows get equal numbers, whatever file, order of keys or spaces they have.

In: the rows of the files. Out: a number per row, by which rows are held out, so that no row is
trained on that an equal one of is held out (C43).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from raytune_ft.data.files.kept import Arrays, kept_arrays
from raytune_ft.data.files.readers import DataRow, Reader
from raytune_ft.errors import DataError

Hashes = npt.NDArray[np.uint64]

_READ_ROWS = 4096
_KEPT_ROWS = 20_000
"""Hashes of smaller files are made faster than they are looked up."""
_FORMAT = "1"
_canonical = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, default=str, separators=(",", ":")
).encode


def content_hashes(readers: Sequence[Reader], used: npt.NDArray[np.bool_], seed: int) -> Hashes:
    """Hash rows' contents, for an order of them that depends on the seed.

    Args:
        readers: files, laid end to end.
        used: which rows are hashed, bool (rows,).
        seed: decides the order of the hashes.

    Returns:
        uint64 (rows,), 0 for rows that are not used.
    """
    found = np.zeros(len(used), dtype=np.uint64)
    start = 0
    for reader in readers:
        stop = start + len(reader)
        found[start:stop] = _of_reader(reader, used[start:stop])
        start = stop
    return _mixed(found, seed)


def _of_reader(reader: Reader, used: npt.NDArray[np.bool_]) -> Hashes:
    def make() -> Arrays:
        return {"hashes": _hashed(reader, used)}

    if len(reader) < _KEPT_ROWS or not used.all():
        return _hashed(reader, used)
    key = ("contents", _FORMAT, reader.fingerprint, str(len(reader)))
    return kept_arrays(key, make)["hashes"]


def _hashed(reader: Reader, used: npt.NDArray[np.bool_]) -> Hashes:
    found = np.zeros(len(used), dtype=np.uint64)
    rows = np.flatnonzero(used)
    for start in range(0, len(rows), _READ_ROWS):
        some = rows[start : start + _READ_ROWS]
        read = reader.read(some.tolist())
        found[some] = [xxhash.xxh3_64_intdigest(_text(row)) for row in read]
    return found


def _text(row: DataRow | DataError) -> bytes:
    text = str(row) if isinstance(row, DataError) else _canonical(row)
    return text.encode("utf-8", "surrogatepass")


def _mixed(hashes: Hashes, seed: int) -> Hashes:
    """Spread hashes anew for each seed, one to one (SplitMix64, Steele et al. 2014)."""
    key = np.uint64(xxhash.xxh3_64_intdigest(f"held out {seed}".encode()))
    with np.errstate(over="ignore"):
        mixed = (hashes ^ key) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
