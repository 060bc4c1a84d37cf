"""Hub rows: a data set by its hub name, streamed from there or from the `datasets` library's cache.

The library makes a copy of everything, mapped into memory, on each machine that reads; a data set
of over 1 GiB, or one with `access: stream`, is read by ranges of its files like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.schema import Source
from raytune_ft.data.files.hub_files import HubFiles, NotPlainError, hub_files
from raytune_ft.data.files.kinds import open_readers
from raytune_ft.data.files.readers import DataRow, Offsets, Reader, even_chunks
from raytune_ft.data.files.remote_files import COPIED_BYTES, open_found
from raytune_ft.errors import DataError, RecipeError


@dataclass(frozen=True)
class HubReader:
    """Rows of one split of a hub data set."""

    path: str
    name: str | None
    data_dir: str | None
    split: str
    n_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.n_rows

    def chunk_ends(self) -> Offsets:
        """Return where chunks of rows end, int64 (chunks,)."""
        return even_chunks(self.n_rows)

    @property
    def fingerprint(self) -> str:
        """The library's own hash of the rows."""
        return str(load_hub(self.path, self.name, self.data_dir, self.split)._fingerprint)

    def check_unchanged(self) -> None:
        """Do nothing: the library's cache is written once."""

    def local_file(self) -> str | None:
        """Return None: every machine can load the data set."""
        return None

    def where(self, row: int) -> str:
        """Return the data set's name and the row's number, from 1."""
        return f"{self.path}/{self.split}:{row + 1}"

    def places(self, rows: Sequence[int]) -> list[str]:
        """Return the places of rows."""
        return [self.where(row) for row in rows]

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Take rows from the cache."""
        table = load_hub(self.path, self.name, self.data_dir, self.split).with_format(None)
        columns = table[[int(row) for row in rows]]
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


@functools.lru_cache(maxsize=8)
def load_hub(path: str, name: str | None, data_dir: str | None, split: str) -> Any:
    """Load a split through the `datasets` library, which fetches it once."""
    import datasets

    return datasets.load_dataset(path, name, data_dir=data_dir, split=split)


def open_hub(source: Source, split: str, key: str) -> list[Reader]:
    """Open a split of a hub data set, as its `access` says.

    Raises:
        RecipeError: it is neither here nor to be had, or has no such split.
        DataError: a file of it is damaged.
    """
    listed = _listed(source, split, key)
    if listed is not None:
        large = sum(file.size or 0 for file in listed.files) >= COPIED_BYTES
        streamed = source.access == "stream" or (source.access == "auto" and large)
        # of what the hub converted the library knows nothing
        if streamed or listed.converted:
            return open_readers(open_found(listed.files, key, "stream" if streamed else "copy"))
    return [_copied(source, split, key)]


def _listed(source: Source, split: str, key: str) -> HubFiles | None:
    """List a data set's files; None where only the library can open it, be it without a network."""
    try:
        return hub_files(source, split, key)
    except (RecipeError, DataError):
        raise
    except NotPlainError as error:
        if source.access == "stream":
            raise RecipeError(
                f"{key}: '{source.path}' cannot be streamed: {error}; use access: copy"
            ) from None
    except Exception as error:  # the hub's client raises errors of several libraries
        if source.access == "stream":
            raise RecipeError(
                f"{key}: the hub cannot be asked for '{source.path}' ({_in_a_line(error)}); "
                "check the name, the network and HF_TOKEN"
            ) from None
    return None


def _copied(source: Source, split: str, key: str) -> HubReader:
    path, name, folder = source.path, source.name, source.data_dir
    try:
        n_rows = len(load_hub(path, name, folder, split))
    except Exception as error:  # as above
        raise RecipeError(
            f"{key}: '{path}' does not exist here, and the hub cannot be read "
            f"({_in_a_line(error)}); copy the data set's files into a folder and give its path"
        ) from None
    return HubReader(path, name, folder, split, n_rows)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
