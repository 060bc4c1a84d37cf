"""Hub files: a data set's name in, the files of one split out, at the commit of now.

Which files belong to a subset and a split is decided by the `datasets` library's own rules, from
the list of files and the data set's card; no row is fetched, and no code of the data set is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.config.schema import Source
from raytune_ft.data.files.kinds import is_data_file, kinds
from raytune_ft.data.files.remote_files import Found
from raytune_ft.errors import RecipeError

_CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps Parquet files made of other data sets."""
_OF_EVERY_SET = {"name", "version", "data_dir", "data_files", "description", "features"}
_KEPT = "hf://datasets/"
_AT_ONCE = 500


class NotPlainError(Exception):
    """The data set's rows are not just what stands in its files; the message tells why."""


@dataclass(frozen=True)
class HubFiles:
    """The files of a split, in the order of their rows; `converted`: the hub made them."""

    files: list[Found]
    converted: bool


def hub_files(source: Source, split: str, key: str) -> HubFiles:
    """List the files of a split.

    Args:
        source: names the data set, its subset and its folder.
        split: as the data set calls it.
        key: the recipe's field, for error messages.

    Raises:
        RecipeError: there is no such split, or it has to be chosen among subsets.
        NotPlainError: only the `datasets` library can make rows of these files.
        Exception: of the hub's client.
    """
    from huggingface_hub import HfApi

    # one request that is not tried again: without a network the copy of an earlier run is used
    sha = str(HfApi().dataset_info(source.path, timeout=30).sha)
    try:
        builder = _builder(source, sha)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return HubFiles(_converted(source, split, key), converted=True)
    _check_plain(builder.config)
    splits = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in splits and any(mark in split for mark in "[+"):
        raise NotPlainError(f"'{split}' is a part of a split")
    if split not in splits:
        raise RecipeError(
            f"{key}: '{source.path}' has no split '{split}'; there is: {', '.join(splits)}"
        )
    root = f"{_KEPT}{source.path}@{sha}/"
    names = [str(url) for url in splits[split]]
    if not all(name.startswith(root) and is_data_file(name) for name in names):
        raise NotPlainError(f"its files are not all {kinds()}")
    files = _infos(source.path, sha, [name.removeprefix(root) for name in names])
    return HubFiles(files, converted=False)


def _builder(source: Source, sha: str) -> Any:
    import datasets

    return datasets.load_dataset_builder(
        source.path, source.name, data_dir=source.data_dir, revision=sha
    )


def _check_plain(config: Any) -> None:
    """Raise NotPlainError if the data set's card sets how its files are to be read."""
    given = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _OF_EVERY_SET and getattr(config, field.name) != _default(field)
    ]
    # a tab is what our reader takes for .tsv, too
    if [name for name in given if name != "sep" or config.sep != "\t"]:
        raise NotPlainError(f"its card sets {', '.join(given)}")


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _converted(source: Source, split: str, key: str) -> list[Found]:
    """List the Parquet files that the hub made of a data set which is a script."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    path = source.path
    try:
        sha = str(HfApi().dataset_info(path, revision=_CONVERTED, timeout=30).sha)
    except RevisionNotFoundError:
        raise RecipeError(
            f"{key}: '{path}' is a script, which is never run, and the hub has no Parquet files "
            "of it; convert it to one of the file formats"
        ) from None
    tree = HfApi().list_repo_tree(path, revision=sha, repo_type="dataset", recursive=True)
    names = sorted(file.path for file in tree if file.path.endswith(".parquet"))
    subsets = sorted({name.partition("/")[0] for name in names})
    subset = source.name or ("default" if "default" in subsets else subsets[0])
    if source.name is None and subset != "default" and len(subsets) > 1:
        raise RecipeError(
            f"{key}: '{path}' has the subsets {', '.join(subsets)}; choose one with name"
        )
    found = [name for name in names if name.startswith(f"{subset}/{split}/")]
    if not found:
        there = sorted({name.rpartition("/")[0] for name in names})
        raise RecipeError(
            f"{key}: '{path}' has no {subset}/{split}; there is: {', '.join(there) or 'nothing'}"
        )
    return _infos(path, sha, found)


def _infos(path: str, sha: str, names: Sequence[str]) -> list[Found]:
    """Ask for the sizes of files, many at a time; they are in the order of the names."""
    from huggingface_hub import HfApi

    sizes: dict[str, Any] = {}
    for start in range(0, len(names), _AT_ONCE):
        some = list(names[start : start + _AT_ONCE])
        for info in HfApi().get_paths_info(path, some, revision=sha, repo_type="dataset"):
            sizes[info.path] = info
    return [
        Found(f"{_KEPT}{path}@{sha}/{name}", sizes[name].size, sizes[name].blob_id)
        for name in names
    ]
