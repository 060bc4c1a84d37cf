"""Remote files: a URL in, blobs out, each read where it lies or from a copy made first.

`copy` fetches everything before the run begins; `stream` fetches nothing; `auto` copies what is
under COPIED_BYTES in total, since a copy is read faster and by other runs too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from raytune_ft.data.files.blobs import Blob
from raytune_ft.data.files.remote import check_url, failed, file_system, shown, version_of
from raytune_ft.data.files.remote_blobs import RemoteBlob, copied, note_found
from raytune_ft.data.files.remote_ranges import gives_ranges, is_web
from raytune_ft.errors import DataError, RecipeError

COPIED_BYTES = 2**30
_TOGETHER = 16
"""Files that are asked for at a time."""
_TOLD_EACH = 8
"""Of more files than that, one line tells that they are fetched."""
_HUB = "hf://"

Access = Literal["auto", "copy", "stream"]
Choose = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Found:
    """A remote file; `size` in bytes is None and `version` empty where the server tells none."""

    url: str
    size: int | None
    version: str


def open_remote(url: str, key: str, choose: Choose, access: Access) -> list[tuple[Blob, str]]:
    """Find the files that a URL names; copy those that are to be copied and are not here.

    Args:
        url: a file, a folder, or a pattern with `*`; over http(s) only a file.
        key: the recipe's field, for error messages.
        choose: picks, of a folder's or pattern's files, by relative name.
        access: of the recipe.

    Returns:
        (blob, name for messages) of each file, in the order of their names.

    Raises:
        RecipeError: the URL is not allowed, names nothing, or cannot be reached.
        DataError: there is no room, or a copy is incomplete.
    """
    check_url(url, key)
    scheme, _, rest = url.partition("://")
    url = f"{scheme.lower()}://{rest}"
    with _told(shown(url), key):
        files = list_files(url, choose)
    if not files:
        raise RecipeError(f"{key}: nothing at {shown(url)}")
    return open_found(files, key, access)


def open_found(files: Sequence[Found], key: str, access: Access) -> list[tuple[Blob, str]]:
    """Return blobs of files that were found, as the recipe wants them read."""
    total = sum(file.size or 0 for file in files)
    if access == "copy" or (access == "auto" and total < COPIED_BYTES):
        return _copies(files, key)
    blobs = _together(lambda file: _streamed(file, key), files[:1])
    if not blobs[0]:  # all of them are of one server
        return _copies(files, key)
    found = [*blobs, *_together(lambda file: _streamed(file, key, asked=True), files[1:])]
    return [
        (blob, blob.place) if blob else _copies([file], key)[0]
        for blob, file in zip(found, files, strict=True)
    ]


class _told:  # noqa: N801 - reads as a word in `with`
    """Turns what the libraries raise into one line."""

    def __init__(self, place: str, key: str) -> None:
        self._place, self._key = place, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RecipeError | DataError):
            raise failed(error, self._place, self._key) from None


def list_files(url: str, choose: Choose) -> list[Found]:
    """List what a URL names, sorted by name; the errors are those of the file system's library."""
    if url.startswith(_HUB):
        url = _pinned(url)
    files, root = file_system(url)
    scheme = url.partition("://")[0]
    if scheme.startswith("http"):
        return [_found(url, files.info(url))]
    if any(mark in root for mark in "*?["):
        infos = files.glob(root, detail=True)
        names = sorted(path for path, info in infos.items() if info["type"] == "file")
        wanted = set(choose(names))
        return [_found(f"{scheme}://{name}", infos[name]) for name in names if name in wanted]
    info = files.info(root)
    if info["type"] == "file":
        return [_found(url, info)]
    prefix = root.rstrip("/") + "/"
    infos = files.find(root, detail=True)
    names = sorted(path for path in infos if path.startswith(prefix))
    wanted = set(choose([name.removeprefix(prefix) for name in names]))
    return [
        _found(f"{scheme}://{name}", infos[name])
        for name in names
        if name.removeprefix(prefix) in wanted
    ]


def _found(url: str, info: Mapping[str, Any]) -> Found:
    return Found(url, info.get("size"), version_of(info))


def _pinned(url: str) -> str:
    """Put a data set's commit into its hub URL, so that the run reads one version of it."""
    from huggingface_hub import HfApi, HfFileSystem

    if not url.startswith(f"{_HUB}datasets/"):
        return url
    path: Any = HfFileSystem().resolve_path(url)
    sha = HfApi().repo_info(path.repo_id, repo_type="dataset", revision=path.revision).sha
    return f"{_HUB}datasets/{path.repo_id}@{sha}/{path.path_in_repo}".rstrip("/")


def _streamed(file: Found, key: str, *, asked: bool = False) -> RemoteBlob | None:
    """Return a file as one that is read by ranges; None, and say why, where this cannot be."""
    place = shown(file.url)
    if file.size is None or not file.version:
        lacks = "does not tell the file's size" if file.size is None else "tells no version"
        _say(f"{place}: the server {lacks}, so all of it is fetched")
        return None
    if is_web(file.url) and file.size and not asked:
        with _told(place, key):
            gives = gives_ranges(file.url, file.size, file.version)
        if not gives:
            _say(f"{place}: the server gives no parts of files, so all of it is fetched")
            return None
    blob = RemoteBlob(file.url, file.size, file.version)
    note_found(blob)
    return blob


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _copies(files: Sequence[Found], key: str) -> list[tuple[Blob, str]]:
    """Return this machine's copies of files, fetched a few at a time."""
    many = len(files) > _TOLD_EACH
    if many:
        total = sum(file.size or 0 for file in files)
        host = urlsplit(files[0].url)
        _say(
            f"copying {len(files):,} files from {host.scheme}://{host.netloc.rpartition('@')[2]} "
            f"({total / 2**20:.1f} MiB), those apart that are here"
        )

    def one(file: Found) -> tuple[Blob, str]:
        place = shown(file.url)
        with _told(place, key):
            origin = RemoteBlob(file.url, file.size or 0, file.version)
            return copied(origin, file.size, told=many), place

    return _together(one, files)


def _together(make: Callable[[Found], Any], files: Sequence[Found]) -> list[Any]:
    """Do something for each file, a few at a time; raise what the first of them raises."""
    if len(files) < 2:
        return [make(file) for file in files]
    pool = ThreadPoolExecutor(min(_TOGETHER, len(files)))
    try:
        return list(pool.map(make, files))
    finally:
        pool.shutdown(cancel_futures=True)
