"""Remote files: which URLs are read, through which fsspec file system, and what messages show.

What is fetched, and from where, is limited: known schemes, no chains of them, no credentials in
the URL, no redirect from a public host into a private network. Messages show a URL without its
query, which may be a signature.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from raytune_ft.errors import DataError, RecipeError

SCHEMES: Mapping[str, str | None] = {
    "http": None,
    "https": None,
    "hf": None,
    "s3": None,
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""Scheme -> the package that fsspec needs for it, besides what is installed."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_VERSION_KEYS = (
    "ETag", "etag", "generation", "md5Hash", "content_md5", "blob_id", "Content-MD5",
    "Last-Modified", "LastModified", "last_modified", "mtime", "updated",
)  # fmt: skip
"""What the file systems call the things that change with a file, the surest first."""


def is_url(path: str) -> bool:
    """Tell whether a path is a URL rather than a file's or hub's name."""
    return "::" in path or _URL.match(path) is not None


def shown(url: str) -> str:
    """Return a URL as messages may show it: without user, password, query and fragment."""
    parts = urlsplit(url)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def check_url(url: str, key: str) -> str:
    """Return a URL's scheme; RecipeError if such URLs are not fetched."""
    match = _URL.match(url)
    scheme = match[1].lower() if match and "::" not in url else ""
    if scheme not in SCHEMES:
        raise RecipeError(
            f"{key}: '{scheme or url.partition('://')[0]}' is no scheme that is fetched; "
            f"use {', '.join(SCHEMES)}, or download the files and give their path"
        )
    # of Azure's URLs a container stands there
    if "@" in urlsplit(url).netloc and scheme not in ("az", "abfs"):
        place = "~/.netrc" if scheme.startswith("http") else "the environment"
        raise RecipeError(
            f"{key}: {shown(url)} is given with a user or password; credentials do not belong in "
            f"recipes, put them into {place}"
        )
    return scheme


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the URL's path in there.

    Raises:
        ImportError: it needs a package that is not here.
    """
    import fsspec

    scheme, _, path = url.partition("://")
    if scheme in ("http", "https"):
        return web_files(), url
    if scheme == "s3":
        return _s3_files(path.partition("/")[0]), path.rstrip("/")
    files, root = fsspec.core.url_to_fs(url)
    return files, str(root)


@functools.cache
def web_files() -> Any:
    """Return the one HTTP client of this process, which follows only allowed redirects."""
    import fsspec

    return fsspec.filesystem("http", client_kwargs=_client_options(), use_listings_cache=False)


@functools.lru_cache(maxsize=64)
def _s3_files(bucket: str) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper

    return ArrowFSWrapper(s3_files(bucket, connect_timeout=30, request_timeout=120))


def s3_files(bucket: str, **limits: float) -> Any:
    """Return Arrow's S3 client: it comes with pyarrow, where s3fs would need botocore beside.

    Keys, profile, region and endpoint are read from the environment's names that AWS gave them;
    a bucket that anyone may read needs AWS_NO_SIGN_REQUEST=1 where there are no keys.

    Args:
        bucket: its region is looked up where nothing else tells it.
        limits: `connect_timeout` and `request_timeout`, in seconds.
    """
    from pyarrow import fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if region is None and not endpoint:
        region = fs.resolve_s3_region(bucket)
    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
    options: dict[str, Any] = {"region": region, **limits}
    if anonymous:
        options["anonymous"] = True
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    return fs.S3FileSystem(**options)


def version_of(info: Mapping[str, Any]) -> str:
    """Return what changes when a file does, of what is told of it; empty if nothing is.

    Where a store lists times more finely than it tells them of one file, seconds count.
    """
    found = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
    if isinstance(found, datetime.datetime):
        return f"{info.get('size')}-{int(found.timestamp())}"
    return str(found)


def failed(error: BaseException, place: str, key: str) -> RecipeError | DataError:
    """Say what went wrong, without the library's text, which may hold a signature."""
    for cause in _causes(error):
        if isinstance(cause, RecipeError | DataError):
            return cause
    if isinstance(error, ImportError):
        scheme = place.partition("://")[0]
        package = SCHEMES.get(scheme) or error.name
        return RecipeError(
            f"{key}: {scheme}:// paths need the package {package}; pip install {package}"
        )
    return RecipeError(
        f"{key}: {place} cannot be fetched ({reason_of(error)}); check the path, the network and "
        "the credentials that this file system reads from the environment"
    )


def reason_of(error: BaseException) -> str:
    """Return what went wrong in a few words of our own."""
    statuses = (getattr(cause, "status", None) for cause in _causes(error))
    status = next((status for status in statuses if isinstance(status, int)), None)
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "no such file, or no answer"
    # the code alone: Arrow's text goes on with addresses
    code = re.search(r"AWS Error (\w+)", str(error))
    return f"{code[0]}" if code else type(error).__name__


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
