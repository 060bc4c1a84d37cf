"""Selections: which rows of the files are used, in which order, in a bit a row or nothing.

In: limits, weights and splits. Out: for row k of a run its number in all files laid end to end. A
selection is a few parts, one after the other: a run of rows, some rows of a run (a bit for each of
them), or numbers in any order.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BYTES = 64
"""Bytes of bits between two counts of the bits before."""
_MANY = 16_384
"""For more numbers at once, all bits are laid out instead of those around each."""


class Part(Protocol):
    """Rows by their place in the part."""

    @property
    def key(self) -> bytes:
        """What tells this part from another."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def numbers(self, places: Numbers) -> Numbers:
        """Return the rows' numbers in the files, int64 of the same shape."""
        ...

    def only(self, mask: Mask) -> Part:
        """Keep the rows whose number in the files is set in the mask."""
        ...

    def cuts(self, edges: Numbers) -> Numbers:
        """Return the places where rows on both sides of an edge meet, int64, ascending."""
        ...


@dataclass(frozen=True, eq=False)
class Run:
    """Rows `first` to `first + size - 1`."""

    first: int
    size: int

    @property
    def key(self) -> bytes:
        """What tells this part from another."""
        return f"run {self.first} {self.size}".encode()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.size

    def numbers(self, places: Numbers) -> Numbers:
        """Return the rows' numbers."""
        return places + self.first

    def only(self, mask: Mask) -> Part:
        """Keep the rows that are set in the mask."""
        return Some.of(self.first, mask[self.first : self.first + self.size])

    def cuts(self, edges: Numbers) -> Numbers:
        """Return the places of the edges."""
        return np.clip(edges - self.first, 0, self.size)


@dataclass(frozen=True, eq=False)
class Some:
    """Some rows of a run that begins with row `first`: those whose bit is set, packed by 8."""

    first: int
    bits: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, first: int, chosen: Mask) -> Some:
        """Pack what is chosen of a run."""
        packed = np.packbits(chosen)
        return cls(first, np.pad(packed, (0, -len(packed) % _BYTES)))

    @property
    def key(self) -> bytes:
        """What tells this part from another."""
        return f"some {self.first} ".encode() + self.bits.tobytes()

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._before[-1])

    def numbers(self, places: Numbers) -> Numbers:
        """Return the rows' numbers: of the k-th row, the place of the k-th bit that is set."""
        if len(places) > _MANY:
            numbers: Numbers = np.flatnonzero(np.unpackbits(self.bits))
            return numbers[places] + self.first
        blocks: Numbers = np.searchsorted(self._before, places, side="right") - 1
        seen = np.cumsum(np.unpackbits(self._blocks[blocks], axis=1), axis=1, dtype=np.uint16)
        inside: Numbers = (seen <= (places - self._before[blocks])[:, None]).sum(
            axis=1, dtype=np.int64
        )
        return blocks * (8 * _BYTES) + inside + self.first

    def only(self, mask: Mask) -> Part:
        """Keep the rows that are set in the mask."""
        mine = np.packbits(mask[self.first : self.first + 8 * len(self.bits)])
        return Some(self.first, self.bits & np.pad(mine, (0, len(self.bits) - len(mine))))

    def cuts(self, edges: Numbers) -> Numbers:
        """Return how many rows are before each edge."""
        places = np.clip(edges - self.first, 0, 8 * len(self.bits))
        blocks, inside = np.divmod(places, 8 * _BYTES)
        found = self._before[blocks]
        partly = np.flatnonzero(inside)
        for some in np.array_split(partly, len(partly) // _MANY + 1):
            bits = np.unpackbits(self._blocks[blocks[some]], axis=1)
            before = np.arange(8 * _BYTES) < inside[some][:, None]
            found[some] += (bits & before).sum(axis=1, dtype=np.int64)
        return found

    @property
    def _blocks(self) -> npt.NDArray[np.uint8]:
        return self.bits.reshape(-1, _BYTES)

    @cached_property
    def _before(self) -> Numbers:
        """Rows before each block, and all, int64 (blocks + 1,)."""
        counts = np.bitwise_count(self._blocks).sum(axis=1, dtype=np.int64)
        return np.append(0, np.cumsum(counts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what can be counted again."""
        return Some, (self.first, self.bits)


@dataclass(frozen=True, eq=False)
class Listed:
    """Rows by their numbers, in any order and as often as they stand there."""

    rows: Numbers

    @property
    def key(self) -> bytes:
        """What tells this part from another."""
        return b"listed " + self.rows.tobytes()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def numbers(self, places: Numbers) -> Numbers:
        """Return the rows' numbers."""
        return self.rows[places]

    def only(self, mask: Mask) -> Part:
        """Keep the rows that are set in the mask."""
        return Listed(self.rows[mask[self.rows]])

    def cuts(self, edges: Numbers) -> Numbers:
        """Return where rows stop to ascend, and where these pass an edge."""
        again = np.flatnonzero(np.diff(self.rows) <= 0) + 1
        bounds = [0, *again.tolist(), len(self.rows)]
        parts = [
            start + np.searchsorted(self.rows[start:stop], edges)
            for start, stop in itertools.pairwise(bounds)
        ]
        return np.unique(np.concatenate([*parts, again]))


@dataclass(frozen=True, eq=False)
class Selection:
    """Parts, one after the other."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1]) if self.parts else 0

    def numbers(self, places: Numbers) -> Numbers:
        """Return the numbers in the files of rows, int64 of the same shape."""
        if len(self.parts) == 1:
            return self.parts[0].numbers(places)
        of = np.searchsorted(self._ends, places, side="right")
        found = np.empty(len(places), dtype=np.int64)
        for part in np.unique(of).tolist():
            mine = of == part
            found[mine] = self.parts[part].numbers(places[mine] - self._start(part))
        return found

    def only(self, mask: Mask) -> Selection:
        """Keep the rows whose number in the files is set in the mask."""
        kept = [part.only(mask) for part in self.parts]
        return Selection(tuple(part for part in kept if len(part)))

    def used(self, n_rows: int) -> Mask:
        """Return which of the files' rows are used, bool (n_rows,)."""
        found = np.zeros(n_rows, dtype=np.bool_)
        for part in self.parts:
            if isinstance(part, Run):
                found[part.first : part.first + part.size] = True
            else:
                found[part.numbers(np.arange(len(part)))] = True
        return found

    def cuts(self, edges: Numbers) -> Numbers:
        """Return where parts end, and where rows pass an edge, int64, ascending, from 1."""
        found = [self._start(place) + part.cuts(edges) for place, part in enumerate(self.parts)]
        cuts = np.unique(np.concatenate([*found, self._ends]))
        return cuts[cuts > 0].astype(np.int64)

    @property
    def key(self) -> bytes:
        """What tells this selection from another."""
        return b"\n".join(hashlib.sha256(part.key).digest() for part in self.parts)

    def _start(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0

    @cached_property
    def _ends(self) -> Numbers:
        return np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what can be counted again."""
        return Selection, (self.parts,)
