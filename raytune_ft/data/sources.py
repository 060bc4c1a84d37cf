"""Sources: the rows of a recipe's data sets, numbered from 0 to n - 1 over all of them.

Stage 1 of the data's way. A RowSource knows which file row stands behind each number, so that a
data task can read any rows at any time. Sampling, weights and splits are a matter of numbers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.content_hashes import content_hashes
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
from raytune_ft.data.files.remote_ahead import fetch_ahead
from raytune_ft.data.rows.formats import decide
from raytune_ft.data.rows.recognition import SAMPLE_ROWS, Recognition
from raytune_ft.data.selection import Listed, Mask, Numbers, Part, Run, Selection, Some
from raytune_ft.errors import DataError, RecipeError

__all__ = ["Numbers", "RowSource", "is_data", "open_sources", "split_validation"]

_LIMIT, _WEIGHT = 1, 2
"""Keep the random choices of one recipe independent of each other."""


@dataclass(frozen=True)
class RowSource:
    """Rows by number; picklable, about a byte per row.

    `sources` has one entry per reader: the same object for all files of one data set, with its
    `map` set where the rows were recognised. `recognised` has one entry per data set.
    `selection`: for each row, its number in all readers laid end to end; None is all, in order. A
    row that a weight repeats stands there several times.
    """

    readers: tuple[Reader, ...]
    sources: tuple[Source, ...]
    selection: Selection | None = None
    recognised: tuple[Recognition, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._file_rows if self.selection is None else len(self.selection)

    def where(self, row: int) -> str:
        """Return a row's place, `file.jsonl:12`."""
        return self.places([row])[0]

    def places(self, indices: Sequence[int] | Numbers) -> list[str]:
        """Return the places of rows, `file.jsonl:12`."""
        readers, rows = self._find(indices)
        found = [""] * len(rows)
        for reader, mine in _groups(readers):
            places = self.readers[reader].places(rows[mine].tolist())
            for number, place in zip(mine.tolist(), places, strict=True):
                found[number] = place
        return found

    def source_of(self, row: int) -> Source:
        """Return the data set that a row comes from."""
        return self.sources_of([row])[0]

    def sources_of(self, indices: Sequence[int] | Numbers) -> list[Source]:
        """Return the data sets that rows come from."""
        return [self.sources[reader] for reader in self._find(indices)[0].tolist()]

    def sets_of(self, indices: Sequence[int] | Numbers) -> npt.NDArray[np.int32]:
        """Return the number of each row's data set, int32 of the same shape."""
        return self._sets[self._find(indices)[0]]

    def chunk_ends(self) -> Numbers:
        """Return where chunks end, int64 (chunks,): rows of a chunk lie together in one file."""
        starts = self._ends - [len(reader) for reader in self.readers]
        edges = [
            start + reader.chunk_ends() for start, reader in zip(starts, self.readers, strict=True)
        ]
        all_edges = np.concatenate([np.zeros(1, np.int64), *edges])
        return all_edges[1:] if self.selection is None else self.selection.cuts(all_edges)

    @property
    def fingerprint(self) -> str:
        """What tells these rows from others: the files' contents and the selection, not paths.

        Text files count by the hash of their content, Parquet and Arrow files by size and time of
        change (or ETag).
        """
        found = hashlib.sha256()
        for reader in self.readers:
            found.update(f"{reader.fingerprint} {len(reader)}\n".encode())
        if self.selection is not None:
            found.update(self.selection.key)
        return found.hexdigest()

    def check_unchanged(self, indices: Sequence[int] | Numbers | None = None) -> None:
        """Look whether files are as they were when they were opened; one look-up per file.

        Args:
            indices: only the files of these rows; None looks at all.

        Raises:
            DataError: names the first file that changed.
        """
        used = range(len(self.readers)) if indices is None else np.unique(self._find(indices)[0])
        for reader in used:
            self.readers[reader].check_unchanged()

    def local_files(self) -> list[str]:
        """Return the paths of files that only this machine is known to have."""
        return [path for reader in self.readers if (path := reader.local_file()) is not None]

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
        readers, rows = self._find(indices)
        found: list[DataRow | DataError] = [{}] * len(rows)
        groups = list(_groups(readers))
        fetch_ahead([(self.readers[reader], rows[mine]) for reader, mine in groups])
        for reader, mine in groups:
            read = self.readers[reader].read(rows[mine].tolist())
            for number, row in zip(mine.tolist(), read, strict=True):
                found[number] = row
        return found

    def used(self) -> Mask:
        """Return which of the files' rows are used, bool (rows of all files,)."""
        if self.selection is None:
            return np.ones(self._file_rows, dtype=np.bool_)
        return self.selection.used(self._file_rows)

    def only(self, mask: Mask) -> RowSource:
        """Return a source of the rows that are set in a mask over the files' rows."""
        selection = self.selection or Selection((Run(0, self._file_rows),))
        return replace(self, selection=selection.only(mask))

    def subset(self, rows: Numbers) -> RowSource:
        """Return a source of some of the rows."""
        return replace(self, selection=Selection((Listed(self._numbers(rows)),)))

    def _numbers(self, indices: Sequence[int] | Numbers) -> Numbers:
        """Return rows' numbers in all readers laid end to end."""
        places = np.asarray(indices, dtype=np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"no row {places.max()} among {len(self)}")
        return places if self.selection is None else self.selection.numbers(places)

    def _find(self, indices: Sequence[int] | Numbers) -> tuple[Numbers, Numbers]:
        """Return each row's reader, and its number in there."""
        numbers = self._numbers(indices)
        readers = np.searchsorted(self._ends, numbers, side="right")
        return readers, numbers - np.append(0, self._ends)[readers]

    @property
    def _file_rows(self) -> int:
        return int(self._ends[-1]) if self.readers else 0

    @cached_property
    def _ends(self) -> Numbers:
        return np.cumsum([len(reader) for reader in self.readers], dtype=np.int64)

    @cached_property
    def _sets(self) -> npt.NDArray[np.int32]:
        changes = [a is not b for a, b in itertools.pairwise(self.sources)]
        return np.cumsum([False, *changes], dtype=np.int32)


def _groups(readers: Numbers) -> list[tuple[int, Numbers]]:
    """Return each reader with the places that it stands at."""
    order = np.argsort(readers, kind="stable")
    found, firsts = np.unique(readers[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, firsts[1:]), strict=False))


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
    parts: list[Part] = []
    recognised: list[Recognition] = []
    rows_before = 0
    for index, source in enumerate(data.sources):
        opened = open_all(source, f"data.sources[{index}].path")
        decided, found = decide(source, _first_rows(opened), f"data.sources[{index}]")
        n_rows = sum(len(reader) for reader in opened)
        parts += _sampled(rows_before, n_rows, source, (seed, index))
        rows_before += n_rows
        readers += opened
        sources += [decided] * len(opened)
        recognised.append(found)
    plain = all(isinstance(part, Run) for part in parts) and len(parts) == len(data.sources)
    selection = None if plain else Selection(tuple(parts))
    return RowSource(tuple(readers), tuple(sources), selection, tuple(recognised))


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

    A fraction has to read and hash every row that is used before the run starts: about half a
    minute per million rows of 2 KB on one core, and 25 bytes of memory per row meanwhile. The
    hashes are kept in the cache folder, for the next run with these files. A name costs nothing.

    Returns:
        Rows to train on, and held-out rows or None.
    """
    if not data.validation:
        return source, None
    if isinstance(data.validation, str):
        return source, _named_validation(data, data.validation)
    used = source.used()
    hashes = content_hashes(source.readers, used, seed)
    distinct = np.unique(hashes[used])
    wanted = max(1, round(data.validation * len(distinct)))
    if wanted >= len(distinct):
        raise RecipeError(
            f"data.validation {data.validation} of {len(distinct)} different rows leaves none to "
            "train on; choose a smaller fraction"
        )
    held_out = used & (hashes < distinct[wanted])
    return source.only(~held_out), replace(source, selection=Selection((Some.of(0, held_out),)))


def _sampled(first: int, n_rows: int, source: Source, seed: tuple[int, int]) -> list[Part]:
    """Choose rows of a data set by its limit and weight; its rows begin with number `first`."""
    chosen: Part = Run(first, n_rows)
    if source.limit is not None and source.limit < n_rows:
        chosen = _sample(chosen, source.limit, first, (*seed, _LIMIT))
    copies, fraction = divmod(source.weight, 1.0)
    part = _sample(chosen, round(fraction * len(chosen)), first, (*seed, _WEIGHT))
    return [*[chosen] * int(copies), *([part] if len(part) else [])]


def _sample(chosen: Part, size: int, first: int, seed: tuple[int, ...]) -> Part:
    """Take `size` rows at random, in their order."""
    if not size:
        return Run(first, 0)
    places = np.sort(np.random.default_rng(seed).permutation(len(chosen))[:size])
    numbers = chosen.numbers(places) - first
    mask = np.zeros(int(numbers[-1]) + 1, dtype=np.bool_)
    mask[numbers] = True
    return Some.of(first, mask)


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
    return RowSource(tuple(readers), tuple(sources), None, tuple(recognised))
