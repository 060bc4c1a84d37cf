"""Hub rows: a data set by its hub name, from the `datasets` library's memory-mapped cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.schema import Source
from raytune_ft.data.files.readers import DataRow, Offsets, even_chunks
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


def open_hub(source: Source, split: str, key: str) -> HubReader:
    """Open a split of a hub data set; RecipeError if it is neither here nor to be had."""
    path, name, folder = source.path, source.name, source.data_dir
    try:
        n_rows = len(load_hub(path, name, folder, split))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = (str(error).splitlines() or [""])[0][:120]
        raise RecipeError(
            f"{key}: '{path}' does not exist here, and the hub cannot be read "
            f"({type(error).__name__}: {reason}); copy the data set's files into a folder "
            "and give its path"
        ) from None
    return HubReader(path, name, folder, split, n_rows)
