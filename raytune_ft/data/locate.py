"""Where data lies: a file, a folder of files or the hub, and what to say if it is none of these."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Source
from raytune_ft.data.readers import SUFFIXES, DataRow, Reader, open_reader
from raytune_ft.errors import DataError, RecipeError

DEFAULT_SPLIT = "train"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the `datasets` library writes beside the data."""


def open_all(source: Source, key: str) -> list[Reader]:
    """Open the files of one source.

    Args:
        source: as in the recipe.
        key: the recipe's field, for error messages.

    Raises:
        RecipeError: nothing of this name is here or on the hub.
        DataError: a file is empty or damaged.
    """
    path = local_path(source.path)
    if path is None:
        return [_open_hub(source, source.split, key)]
    return [
        open_reader(file, _display(file, path, source.path))
        for file in _files(path, source, source.split, key)
    ]


def split_readers(source: Source, split: str) -> list[Reader]:
    """Open another split of a source; RecipeError if it has no such split."""
    key = "data.validation"
    path = local_path(source.path)
    if path is None:
        return [_open_hub(source, split, key)]
    if path.is_file():
        raise RecipeError(
            f"{key}: no file '{split}', and {source.path} is one file without splits; "
            "give a file's path or a fraction such as 0.05"
        )
    return [
        open_reader(file, _display(file, path, source.path))
        for file in _files(path, source, split, key)
    ]


def local_path(path: str) -> Path | None:
    """Find a path from the current folder, else among the shipped configs; None if absent."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    from raytune_ft.config.catalog import configs_dir

    shipped = configs_dir() / path
    return shipped if shipped.exists() else None


def _display(file: Path, root: Path, given: str) -> str:
    """Name a file as the user would: from the path that the recipe gives."""
    return given if file == root else str(Path(given) / file.relative_to(root))


def _files(path: Path, source: Source, split: str, key: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise RecipeError(f"{key}: {source.path} is no {', '.join(SUFFIXES)} file; convert it")
        return [path]
    root = path / source.name if source.name and (path / source.name).is_dir() else path
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in SUFFIXES
        and file.name not in _NO_DATA
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise RecipeError(f"{key}: no {', '.join(SUFFIXES)} file in folder {source.path}")
    # A whole word of the name: 'train' must not find 'constraints.jsonl'.
    word = re.compile(rf"(?<![A-Za-z]){re.escape(split)}(?![A-Za-z])", re.IGNORECASE)
    named = [file for file in files if word.search(str(file.relative_to(root)))]
    if not named and split != DEFAULT_SPLIT:
        raise RecipeError(
            f"{key}: no file with split '{split}' in its name in folder {source.path}; "
            f"there are: {', '.join(file.name for file in files[:5])}"
        )
    return named or files


@dataclass(frozen=True)
class HubReader:
    """Rows of a hub data set, from the `datasets` library's memory-mapped cache."""

    path: str
    name: str | None
    split: str
    n_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.n_rows

    def where(self, row: int) -> str:
        """Return the data set's name and the row's number, from 1."""
        return f"{self.path}/{self.split}:{row + 1}"

    def read(self, rows: Sequence[int]) -> list[DataRow | DataError]:
        """Take rows from the cache."""
        table = _load_hub(self.path, self.name, self.split).with_format(None)
        return [table[int(row)] for row in rows]


@functools.lru_cache(maxsize=8)
def _load_hub(path: str, name: str | None, split: str) -> Any:
    import datasets

    return datasets.load_dataset(path, name, split=split)


def _open_hub(source: Source, split: str, key: str) -> HubReader:
    path = source.path
    if not _HUB_NAME.fullmatch(path) or Path(path).suffix in SUFFIXES:
        raise RecipeError(f"{key}: {path} does not exist; {_nearest(Path(path).expanduser())}")
    try:
        n_rows = len(_load_hub(path, source.name, split))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = (str(error).splitlines() or [""])[0][:120]
        raise RecipeError(
            f"{key}: '{path}' does not exist here, and the hub cannot be read "
            f"({type(error).__name__}: {reason}); copy the data set's files into a folder "
            "and give its path"
        ) from None
    return HubReader(path, source.name, split, n_rows)


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"folder {folder} does not exist either; paths start at the current folder"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"nearest there: {folder / near[0]}" if near else "paths start at the current folder"
