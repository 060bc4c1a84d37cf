"""Remote files: a URL in, complete copies in the cache folder out, through fsspec.

What is fetched, and from where, is limited: known schemes, no chains of them, no credentials in
the URL, no redirect from a public host into a private network. Messages show a URL without its
query, which may be a signature.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from fsspec.callbacks import Callback

from raytune_ft.data.files.kept import check_room, kept_file
from raytune_ft.errors import DataError, RecipeError

SCHEMES: Mapping[str, str | None] = {
    "http": None,
    "https": None,
    "hf": None,
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""Scheme -> the package that fsspec needs for it, besides what is installed."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_VERSION_KEYS = (
    "ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "mtime",
    "updated", "generation", "md5Hash", "content_md5", "blob_id", "sha", "VersionId",
)  # fmt: skip
"""What the file systems call the things that change with a file."""
_UNSAFE = re.compile(r"[^\w.-]+")
Choose = Callable[[list[str]], list[str]]


def is_url(path: str) -> bool:
    """Tell whether a path is a URL rather than a file's or hub's name."""
    return "::" in path or _URL.match(path) is not None


def shown(url: str) -> str:
    """Return a URL as messages may show it: without user, password, query and fragment."""
    parts = urlsplit(url)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def fetch(url: str, key: str, choose: Choose) -> list[tuple[Path, str]]:
    """Fetch the files that a URL names, those apart that are here already.

    Args:
        url: a file, a folder, or a pattern with `*`; over http(s) only a file.
        key: the recipe's field, for error messages.
        choose: picks, of a folder's or pattern's files, by relative name.

    Returns:
        (copy, name for messages) of each file, in the order of their names.

    Raises:
        RecipeError: the URL is not allowed, names nothing, or cannot be reached.
        DataError: there is no room, or the copy is incomplete.
    """
    scheme = check_url(url, key)
    name = shown(url)
    try:
        files, root = _open(url, scheme, key)
        found = _names(files, root, scheme, choose)
        infos = [(each, files.info(each)) for each in found]
    except (RecipeError, DataError):
        raise
    except Exception as error:  # each file system raises errors of its own library
        raise _failed(error, name, key) from None
    if not infos:
        raise RecipeError(f"{key}: nothing at {name}")
    copies = []
    for path, info in infos:
        place = name if path == root else f"{scheme}://{path}"
        copies.append((_copy(files, path, info, place, key), place))
    return copies


def check_url(url: str, key: str) -> str:
    """Return a URL's scheme; RecipeError if such URLs are not fetched."""
    match = _URL.match(url)
    scheme = match[1].lower() if match and "::" not in url else ""
    if scheme not in SCHEMES:
        raise RecipeError(
            f"{key}: '{scheme or url.partition('://')[0]}' is no scheme that is fetched; "
            f"use {', '.join(SCHEMES)}, or download the files and give their path"
        )
    if "@" in urlsplit(url).netloc and scheme in ("http", "https"):
        raise RecipeError(
            f"{key}: {shown(url)} is given with a user or password; credentials do not belong in "
            "recipes, put them into ~/.netrc"
        )
    return scheme


def _open(url: str, scheme: str, key: str) -> tuple[Any, str]:
    import fsspec

    options = {"client_kwargs": _client_options(), "use_listings_cache": False}
    try:
        files, root = fsspec.core.url_to_fs(url, **(options if scheme.startswith("http") else {}))
        return files, str(root)
    except ImportError:
        package = SCHEMES[scheme]
        raise RecipeError(
            f"{key}: {scheme}:// paths need the package {package}; pip install {package}"
        ) from None


def _names(files: Any, root: str, scheme: str, choose: Choose) -> list[str]:
    """List what is to be fetched, sorted."""
    if scheme.startswith("http"):
        return [root]
    if any(mark in root for mark in "*?["):
        found = sorted(files.glob(root))
        wanted = set(choose(found))
        return [path for path in found if path in wanted]
    if not files.isdir(root):
        return [root]
    prefix = root.rstrip("/") + "/"
    found = sorted(path for path in files.find(root) if path.startswith(prefix))
    wanted = set(choose([path.removeprefix(prefix) for path in found]))
    return [path for path in found if path.removeprefix(prefix) in wanted]


def _copy(files: Any, path: str, info: Mapping[str, Any], place: str, key: str) -> Path:
    """Return the copy of a file, fetched unless this version of it is here."""
    version = [f"{k}={info[k]}" for k in _VERSION_KEYS if info.get(k) is not None]
    size = info.get("size")

    def make(target: Path) -> None:
        check_room(size or 0, place)
        known = f" ({size / 2**20:.1f} MiB)" if size else ""
        print(f"fetching {place}{known}", file=sys.stderr, flush=True)
        try:
            files.get_file(path, str(target), callback=_Room(place))
        except (RecipeError, DataError):
            raise
        except Exception as error:  # as above
            raise _failed(error, place, key) from None
        got = target.stat().st_size
        if size is not None and got != size:
            raise DataError(f"{place}: {got} bytes came of {size}; try again")

    what = ("fetched", place, path, str(size), *version)
    name = _UNSAFE.sub("_", unquote(PurePosixPath(urlsplit(path).path).name)).lstrip(".")
    # without a version nothing tells whether the copy is still what the server has
    return kept_file(what, name or "rows", make, again=not version)


class _Room(Callback):  # type: ignore[misc]
    """Stops a download that would fill the disk."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        check_room(0, self._place)


def _failed(error: BaseException, place: str, key: str) -> RecipeError | DataError:
    """Say what went wrong, without the library's text, which may hold a signature."""
    for cause in _causes(error):
        if isinstance(cause, RecipeError | DataError):
            return cause
    if isinstance(error, ImportError):
        return RecipeError(f"{key}: {place} needs a package that is not here: {error.name}")
    status = next((c.status for c in _causes(error) if hasattr(c, "status")), None)
    what = type(error).__name__ if status is None else f"HTTP status {status}"
    if isinstance(error, FileNotFoundError) and status is None:
        what = "no such file, or no answer"
    return RecipeError(
        f"{key}: {place} cannot be fetched ({what}); check the path, the network and the "
        "credentials that this file system reads from the environment"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _client_options() -> dict[str, Any]:
    """Options of the HTTP client: a time limit without progress, and the rule for redirects."""
    import aiohttp

    traces = aiohttp.TraceConfig()
    traces.on_request_redirect.append(_on_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
    return {"trace_configs": [traces], "timeout": timeout, "trust_env": True}


async def _on_redirect(_session: Any, _context: Any, params: Any) -> None:
    start = str(params.url)
    target = urljoin(start, params.response.headers.get("Location", ""))
    check_redirect(start, target)


def check_redirect(start: str, target: str) -> None:
    """Raise RecipeError for a redirect that a data file has no need of."""
    before, after = urlsplit(start), urlsplit(target)
    leaves_tls = before.scheme == "https" and after.scheme != "https"
    if after.scheme not in ("http", "https") or leaves_tls:
        raise RecipeError(f"{shown(start)} redirects to {shown(target)}, which is not followed")
    if is_private(after.hostname or "") and not is_private(before.hostname or ""):
        raise RecipeError(
            f"{shown(start)} redirects into a private network ({after.hostname}), which is not "
            "followed; give the file's own address"
        )


def is_private(host: str) -> bool:
    """Tell whether a host is this machine or in a network that the public one cannot reach."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return any(not ipaddress.ip_address(ip.partition("%")[0]).is_global for ip in found)
