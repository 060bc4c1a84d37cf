"""Sources: the rows of a recipe's data sets, numbered from 0 to n - 1 over all of them.

Stage 1 of the data's way. A RowSource knows which file row stands behind each number, so that a
data task can read any rows at any time. Sampling, weights and splits are a matter of numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.files.kinds import is_data_file
from raytune_ft.data.files.locate import (
    folder_names,
    is_pattern,
    local_path,
    names_file,
    open_all,
    split_readers,
)
from raytune_ft.data.files.readers import DataRow, Reader
from raytune_ft.data.files.remote import is_url
from raytune_ft.data.rows.formats import decide
from raytune_ft.data.rows.recognition import SAMPLE_ROWS, Recognition
from raytune_ft.errors import DataError, RecipeError

Numbers = npt.NDArray[np.int64]

_LIMIT, _WEIGHT, _SPLIT = 1, 2, 3
"""Keep the random choices of one recipe independent of each other."""
_HASH_ROWS = 4096


@dataclass(frozen=True)
class RowSource:
    """Rows by number; picklable, a few bytes per row.

    `sources` has one entry per reader: the same object for all files of one data set, with its
    `map` set where the rows were recognised. `recognised` has one entry per data set.
    `selection` int64 (n,): for each row, its number in all readers laid end to end. A row that a
    weight repeats stands there several times.
    """

    readers: tuple[Reader, ...]
    sources: tuple[Source, ...]
    selection: Numbers
    recognised: tuple[Recognition, ...] = ()
    _ends: Numbers = field(init=False, repr=False)
    _sets: npt.NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [len(reader) for reader in self.readers]
        object.__setattr__(self, "_ends", np.cumsum(sizes, dtype=np.int64))
        changes = [a is not b for a, b in zip(self.sources, self.sources[1:], strict=False)]
        object.__setattr__(self, "_sets", np.cumsum([False, *changes], dtype=np.int32))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.selection)

    def where(self, row: int) -> str:
        """Return a row's place, `file.jsonl:12`."""
        reader, place = self._find(row)
        return self.readers[reader].where(place)

    def source_of(self, row: int) -> Source:
        """Return the data set that a row comes from."""
        return self.sources[self._find(row)[0]]

    def sets_of(self, indices: Sequence[int] | Numbers) -> npt.NDArray[np.int32]:
        """Return the number of each row's data set, int32 of the same shape."""
        numbers = self.selection[np.asarray(indices, dtype=np.int64)]
        return self._sets[np.searchsorted(self._ends, numbers, side="right")]

    def chunk_ends(self) -> Numbers:
        """Return where chunks end, int64 (chunks,): rows of a chunk lie together in one file."""
        edges = np.concatenate([np.zeros(1, np.int64), *self._chunks()])
        again = np.flatnonzero(np.diff(self.selection) <= 0) + 1  # a copy of the same rows begins
        bounds = [0, *again.tolist(), len(self.selection)]
        ends = [
            start + np.searchsorted(self.selection[start:stop], edges)
            for start, stop in itertools.pairwise(bounds)
        ]
        found = np.unique(np.concatenate([*ends, [len(self.selection)]]))
        return found[found > 0].astype(np.int64)

    def _chunks(self) -> list[Numbers]:
        """List the ends of each reader's chunks, in row numbers over all readers."""
        starts = self._ends - [len(reader) for reader in self.readers]
        return [
            start + reader.chunk_ends() for start, reader in zip(starts, self.readers, strict=True)
        ]

    def rows(self, indices: Sequence[int] | Numbers) -> list[DataRow]:
        """Read rows, in the order asked for; DataError for the first that cannot be read."""
        rows: list[DataRow] = []
        for row in self.try_rows(indices):
            if isinstance(row, DataError):
                raise row
            rows.append(row)
        return rows

    def try_rows(self, indices: Sequence[int] | Numbers) -> list[DataRow | DataError]:
        """Read rows, in the order asked for, each as its columns or as what is wrong with it."""
        numbers = self.selection[np.asarray(indices, dtype=np.int64)]
        readers = np.searchsorted(self._ends, numbers, side="right")
        found: list[DataRow | DataError] = [{}] * len(numbers)
        for reader in np.unique(readers):
            places = np.flatnonzero(readers == reader)
            first = int(self._ends[reader - 1]) if reader else 0
            read = self.readers[reader].read((numbers[places] - first).tolist())
            for place, row in zip(places, read, strict=True):
                found[place] = row
        return found

    def subset(self, rows: Numbers) -> RowSource:
        """Return a source of some of the rows."""
        return replace(self, selection=self.selection[rows])

    def _find(self, row: int) -> tuple[int, int]:
        number = int(self.selection[row])
        reader = int(np.searchsorted(self._ends, number, side="right"))
        return reader, number - (int(self._ends[reader - 1]) if reader else 0)


def open_sources(data: DataSection, seed: int) -> RowSource:
    """Open every source of a recipe, with its `limit` and `weight`.

    Args:
        data: the recipe's section.
        seed: decides the samples that `limit` and a fractional `weight` take.

    Raises:
        RecipeError: a path does not exist, or holds no data files.
        DataError: a file is empty or damaged.
    """
    readers: list[Reader] = []
    sources: list[Source] = []
    parts: list[Numbers] = []
    recognised: list[Recognition] = []
    rows_before = 0
    for index, source in enumerate(data.sources):
        opened = open_all(source, f"data.sources[{index}].path")
        decided, found = decide(source, _first_rows(opened), f"data.sources[{index}]")
        n_rows = sum(len(reader) for reader in opened)
        parts.append(rows_before + _sampled(n_rows, source, (seed, index)))
        rows_before += n_rows
        readers += opened
        sources += [decided] * len(opened)
        recognised.append(found)
    numbers = np.concatenate(parts)
    return RowSource(tuple(readers), tuple(sources), numbers, tuple(recognised))


def _first_rows(readers: Sequence[Reader]) -> list[DataRow]:
    """Read the first rows of a data set, without those that cannot be read."""
    rows: list[DataRow] = []
    for reader in readers:
        n_rows = min(len(reader), SAMPLE_ROWS - len(rows))
        rows += [row for row in reader.read(range(n_rows)) if not isinstance(row, DataError)]
        if len(rows) == SAMPLE_ROWS:
            break
    return rows


def is_data(path: str) -> bool:
    """Tell whether a path is one of data: a file, a pattern, a URL or a folder with data files."""
    if is_data_file(path) or is_url(path) or is_pattern(path):
        return True
    folder = local_path(path)
    return folder is not None and folder.is_dir() and bool(folder_names(folder))


def split_validation(
    source: RowSource, data: DataSection, seed: int
) -> tuple[RowSource, RowSource | None]:
    """Divide off the rows that `data.validation` holds out.

    A fraction is taken by content, so that equal rows never stand on both sides; weights do not
    repeat held-out rows. A name is a file, or a split of the sources.

    Returns:
        Rows to train on, and held-out rows or None.
    """
    if not data.validation:
        return source, None
    if isinstance(data.validation, str):
        return source, _named_validation(data, data.validation)
    hashes = _content_hashes(source, seed)
    distinct = np.unique(hashes)
    wanted = max(1, round(data.validation * len(distinct)))
    if wanted >= len(distinct):
        raise RecipeError(
            f"data.validation {data.validation} of {len(distinct)} different rows leaves none to "
            "train on; choose a smaller fraction"
        )
    held_out = hashes < distinct[wanted]
    _, first_copies = np.unique(source.selection, return_index=True)
    validation = np.intersect1d(np.flatnonzero(held_out), first_copies)
    return source.subset(np.flatnonzero(~held_out)), source.subset(validation)


def _sampled(n_rows: int, source: Source, seed: tuple[int, int]) -> Numbers:
    """Choose row numbers, int64, by a source's limit and weight."""
    chosen = np.arange(n_rows, dtype=np.int64)
    if source.limit is not None and source.limit < n_rows:
        chosen = _sample(chosen, source.limit, (*seed, _LIMIT))
    copies, fraction = divmod(source.weight, 1.0)
    part = _sample(chosen, round(fraction * len(chosen)), (*seed, _WEIGHT))
    return np.concatenate([*[chosen] * int(copies), part])


def _sample(numbers: Numbers, size: int, seed: tuple[int, ...]) -> Numbers:
    """Take `size` numbers at random, in their order."""
    taken = np.random.default_rng(seed).permutation(len(numbers))[:size]
    return numbers[np.sort(taken)]


def _content_hashes(source: RowSource, seed: int) -> npt.NDArray[np.uint64]:
    """Hash every row's content to a number, uint64 of shape (n,); equal rows, equal numbers."""
    key = hashlib.blake2b(repr((seed, _SPLIT)).encode(), digest_size=16).digest()
    hashes = np.empty(len(source), dtype=np.uint64)
    for start in range(0, len(source), _HASH_ROWS):
        places = np.arange(start, min(start + _HASH_ROWS, len(source)))
        for place, row in zip(places, source.try_rows(places), strict=True):
            text = str(row) if isinstance(row, DataError) else _canonical(row)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
            hashes[place] = int.from_bytes(digest.digest(), "big")
    return hashes


def _canonical(row: DataRow) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def _named_validation(data: DataSection, name: str) -> RowSource:
    """Open held-out rows by name; each data set's format is told from its own first rows."""
    if names_file(name):
        only = data.sources[0].model_copy(update={"path": name, "limit": None, "weight": 1.0})
        opened = [(only, open_all(only, "data.validation"))]
    else:
        opened = [(source, split_readers(source, name)) for source in data.sources]
    readers: list[Reader] = []
    sources: list[Source] = []
    recognised: list[Recognition] = []
    for index, (source, found) in enumerate(opened):
        decided, why = decide(source, _first_rows(found), f"data.sources[{index}]")
        readers += found
        sources += [decided] * len(found)
        recognised.append(why)
    n_rows = sum(len(reader) for reader in readers)
    numbers = np.arange(n_rows, dtype=np.int64)
    return RowSource(tuple(readers), tuple(sources), numbers, tuple(recognised))
