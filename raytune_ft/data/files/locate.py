"""Where data lies: a file, a folder, a pattern, a URL or the hub, and what to say if nowhere."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from raytune_ft.config.schema import Source
from raytune_ft.data.files.blobs import LocalBlob
from raytune_ft.data.files.hub_rows import open_hub
from raytune_ft.data.files.kinds import is_data_file, kinds, open_readers
from raytune_ft.data.files.readers import Reader
from raytune_ft.data.files.remote import is_url, shown
from raytune_ft.data.files.remote_files import open_remote
from raytune_ft.errors import RecipeError

DEFAULT_SPLIT = "train"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_URL = "file://"
_STATE = "state.json"
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", _STATE}
"""Files that the `datasets` library writes beside the data."""


def open_all(source: Source, key: str) -> list[Reader]:
    """Open the files of one source.

    Args:
        source: as in the recipe.
        key: the recipe's field, for error messages.

    Raises:
        RecipeError: nothing of this name is here, on the hub or at the URL.
        DataError: a file is empty or damaged.
    """
    return _open(source, source.split, key)


def split_readers(source: Source, split: str) -> list[Reader]:
    """Open another split of a source; RecipeError if it has no such split."""
    key = "data.validation"
    path = local_path(source.path)
    is_one = path.is_file() if path is not None else is_data_file(source.path.partition("?")[0])
    if is_one or is_pattern(source.path):
        raise RecipeError(
            f"{key}: no file '{split}', and {_name(source.path)} has no splits; "
            "give a file's path or a fraction such as 0.05"
        )
    return _open(source, split, key)


def local_path(path: str) -> Path | None:
    """Find a path from the current folder, else among the shipped configs; None if absent."""
    given = Path(path.removeprefix(_FILE_URL)).expanduser()
    try:
        if given.exists():
            return given
    except (OSError, ValueError):  # too long, or with a NUL
        return None
    from raytune_ft.config.catalog import configs_dir

    shipped = configs_dir() / path
    return shipped if shipped.exists() else None


def names_file(path: str) -> bool:
    """Tell whether a name is meant as a file, a pattern or a URL, not as a split."""
    return is_data_file(path.partition("?")[0]) or "/" in path or is_pattern(path)


def is_pattern(path: str) -> bool:
    """Tell whether a path is a pattern of several files."""
    return any(mark in path for mark in "*?[") and not path.startswith(("http://", "https://"))


def _name(path: str) -> str:
    return shown(path) if is_url(path) else path


def _open(source: Source, split: str, key: str) -> list[Reader]:
    path = local_path(source.path)
    if path is not None:
        files = _files(path, source, split, key)
        return open_readers([(LocalBlob(f), _display(f, path, source.path)) for f in files])
    given = source.path.removeprefix(_FILE_URL)
    if is_url(given):
        return _open_url(source, split, key)
    if is_pattern(given):
        files = _matching(given, key)
        return open_readers([(LocalBlob(file), str(file)) for file in files])
    if not _HUB_NAME.fullmatch(given) or is_data_file(given):
        raise RecipeError(f"{key}: {given} does not exist; {_nearest(Path(given).expanduser())}")
    return open_hub(source, split, key)


def _open_url(source: Source, split: str, key: str) -> list[Reader]:
    url = source.path
    if url.startswith(("http://", "https://")) and not is_data_file(url.partition("?")[0]):
        raise RecipeError(f"{key}: {shown(url)} is no {kinds()} file; give a file's own address")
    if source.data_dir:
        url = f"{url.rstrip('/')}/{source.data_dir.strip('/')}"

    def choose(names: list[str]) -> list[str]:
        known = [name for name in names if _counts(name.rpartition("/")[2])]
        if is_pattern(url):
            return known
        return of_split(_richer(known), split, f"{key}: {shown(url)}")

    return open_readers(open_remote(url, key, choose, source.access))


def _display(file: Path, root: Path, given: str) -> str:
    """Name a file as the user would: from the path that the recipe gives."""
    return given if file == root else str(Path(given) / file.relative_to(root))


def _matching(pattern: str, key: str) -> list[Path]:
    """List the data files that a pattern matches, sorted; `**` goes through folders."""
    found = (Path(name) for name in glob.iglob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207
    files = sorted(file for file in found if _counts(file.name) and file.is_file())
    if not files:
        raise RecipeError(f"{key}: no {kinds()} file matches {pattern}; patterns start at "
                          "the current folder, and ** goes through folders")  # fmt: skip
    return files


def _counts(name: str) -> bool:
    """Tell by its name whether a file of a folder is data."""
    return is_data_file(name) and name not in _NO_DATA and not name.startswith(".")


def _files(path: Path, source: Source, split: str, key: str) -> list[Path]:
    if path.is_file():
        if not is_data_file(path.name):
            raise RecipeError(f"{key}: {source.path} is no {kinds()} file; convert it")
        return [path]
    root = _root(path, source, key)
    files = folder_names(root)
    if not files:
        raise RecipeError(f"{key}: no {kinds()} file in folder {source.path}")
    return [root / name for name in of_split(files, split, f"{key}: folder {source.path}")]


def _root(path: Path, source: Source, key: str) -> Path:
    """Return the folder that holds a source's rows."""
    root = path
    if source.data_dir:
        root = path / source.data_dir
        if not root.is_dir() or not root.resolve().is_relative_to(path.resolve()):
            raise RecipeError(
                f"{key.rpartition('.')[0]}.data_dir: no folder '{source.data_dir}' in {source.path}"
            )
    named = root / source.name if source.name else root
    return named if named.is_dir() else root


def folder_names(root: Path) -> list[str]:
    """List a folder's data files, by relative name, in the order of their rows.

    Where the `datasets` library saved a data set, its `state.json` says which Arrow files it is
    made of; others there are leftovers of its cache. Text files count only if there is nothing
    else, since they are mostly a licence or a description.
    """
    found = _found(root)
    folder_of = {name: name.rpartition("/")[0] for name in found}
    saved = {folder: _saved(root / folder) for folder in set(folder_of.values())}
    files = [name for name in found if saved[folder_of[name]] is None]
    for folder in sorted(folder for folder, names in saved.items() if names is not None):
        named = (str(Path(folder, name)) for name in saved[folder] or ())
        files += [name for name in named if name in folder_of]
    return _richer(files)


def _found(root: Path) -> list[str]:
    """List a folder's data files, by relative name; folders with a dot are not looked into."""
    found: list[tuple[str, ...]] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        parts = Path(folder).relative_to(root).parts
        found += [
            (*parts, name) for name in names if _counts(name) and Path(folder, name).is_file()
        ]
    return ["/".join(parts) for parts in sorted(found)]


def _richer(names: Sequence[str]) -> list[str]:
    """Leave out text files, unless there is nothing else."""
    richer = [name for name in names if ".txt" not in name or ".txt" not in Path(name).suffixes]
    return richer or list(names)


def _saved(folder: Path) -> list[str] | None:
    """Return the files of a data set that `save_to_disk` wrote; None for other folders."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_split(names: Sequence[str], split: str, what: str) -> list[str]:
    """Pick the files of a split: those with its name in theirs, else all for `train`.

    Raises:
        RecipeError: begins with `what`; no file is of this split.
    """
    # A whole word of the name: 'train' must not find 'constraints.jsonl'.
    word = re.compile(rf"(?<![A-Za-z]){re.escape(split)}(?![A-Za-z])", re.IGNORECASE)
    named = [name for name in names if word.search(name)]
    if not named and split != DEFAULT_SPLIT:
        some = ", ".join(Path(name).name for name in names[:5]) or "no data file"
        raise RecipeError(f"{what} has no file with split '{split}' in its name; there is: {some}")
    return named or list(names)


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"folder {folder} does not exist either; paths start at the current folder"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"nearest there: {folder / near[0]}" if near else "paths start at the current folder"
