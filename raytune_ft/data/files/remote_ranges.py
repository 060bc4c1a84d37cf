"""Ranges of remote files: URL and byte ranges in, bytes out, several at a time.

What fails for a moment is tried again; what fails for good is one DataError without the URL's
query, which may be a signature. Every answer is held against the version that the run began with.
Web servers (and the hub, which is one) are asked here, so that each answer's status, version and
length are seen; other stores through their fsspec file systems.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

from raytune_ft.data.files.remote import (
    file_system,
    reason_of,
    shown,
    version_of,
    web_files,
)
from raytune_ft.errors import DataError, RecipeError

AT_ONCE = 16
"""Requests of one process that are under way at a time."""
TRIES = 6
FIRST_WAIT_S = 0.2
"""Before the second try; doubled before each later one."""
_LONGEST_WAIT_S = 30.0
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_FORGOTTEN = {401, 403, 404, 410}
"""What a signed address says once it is too old."""
_HUB = re.compile(r"hf://(datasets/[^@]+)@([0-9a-f]{40})/(.+)")

Ranges = Sequence[tuple[int, int]]
_T = TypeVar("_T")


class NoRangesError(Exception):
    """A server answers with the whole file, whatever part is asked for."""


class _ChangedError(Exception):
    """The file is not the one that the run began with."""


class _BusyError(Exception):
    """A server has no answer now."""

    def __init__(self, status: int, wait_s: float) -> None:
        super().__init__(f"HTTP status {status}")
        self.status, self.wait_s = status, wait_s


def is_web(url: str) -> bool:
    """Tell whether a file is read by HTTP: from a web server or the hub at a pinned commit."""
    return url.startswith(("http://", "https://")) or _HUB.fullmatch(url) is not None


def is_fixed(url: str) -> bool:
    """Tell whether a URL names one version for ever, as the hub's do with a commit."""
    return _HUB.fullmatch(url) is not None


def read_ranges(url: str, ranges: Ranges, size: int, version: str) -> list[bytes]:
    """Return the bytes of each range [start, end), none empty or over the file's end.

    Raises:
        DataError: the file changed, or cannot be read.
    """
    place = shown(url)
    try:
        return _read(url, ranges, size, version)
    except NoRangesError:
        raise DataError(
            f"{place}: the server does not give parts of files any more; use access: copy"
        ) from None
    except _ChangedError:
        raise changed(place) from None
    except (DataError, RecipeError):
        raise
    except Exception as error:  # each file system raises errors of its own library
        raise unreadable(place, error) from None


def gives_ranges(url: str, size: int, version: str) -> bool:
    """Ask a server for the first byte of a file, to see whether it gives parts.

    Raises:
        Exception: of the file system's library.
    """
    try:
        return len(_read(url, [(0, 1)], size, version)[0]) == 1
    except NoRangesError:
        return False
    except _ChangedError:
        raise changed(shown(url)) from None


def is_now(url: str, size: int, version: str) -> bool:
    """Tell whether a file is of this version; DataError if it is gone or cannot be asked."""
    try:
        if is_web(url):
            from fsspec.asyn import sync

            files = web_files()
            return bool(sync(files.loop, _is_now, files, url, size, version))
        files, path = file_system(url)
        return version_of(patient(lambda: files.info(path))) == version
    except (DataError, RecipeError):
        raise
    except Exception as error:  # as above
        raise unreadable(shown(url), error) from None


def changed(place: str) -> DataError:
    """Return what there is to say of a file that is not as it was."""
    return DataError(
        f"{place}: changed since the run began; put the file back as it was, or start a new run"
    )


def unreadable(place: str, error: BaseException) -> DataError:
    """Return what there is to say of a file that cannot be read."""
    return DataError(
        f"{place}: cannot be read ({reason_of(error)}); check the network and the credentials "
        "that this file system reads from the environment, then resume"
    )


def _read(url: str, ranges: Ranges, size: int, version: str) -> list[bytes]:
    if is_web(url):
        from fsspec.asyn import sync

        files = web_files()
        # of the hub, the commit in the address is the version
        pinned = "" if is_fixed(url) else version
        return list(sync(files.loop, _all_parts, files, url, ranges, size, pinned))
    return _from_store(url, ranges, version)


def _from_store(url: str, ranges: Ranges, version: str) -> list[bytes]:
    files, path = file_system(url)
    ask = _asker(files, path)

    def part(bounds: tuple[int, int]) -> bytes:
        found = ask(*bounds)
        if len(found) != bounds[1] - bounds[0]:
            raise _ChangedError
        return found

    with ThreadPoolExecutor(min(AT_ONCE, max(len(ranges), 1))) as pool:
        found = list(pool.map(lambda bounds: patient(lambda: part(bounds)), ranges))
    # asked for afterwards, so that all that was read is of that version
    if version_of(patient(lambda: files.info(path))) != version:
        raise _ChangedError
    return found


def _asker(files: Any, path: str) -> Callable[[int, int], bytes]:
    """Return what reads a range of a file."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    if isinstance(files, ArrowFSWrapper):  # it opens files, once for all ranges
        file = patient(lambda: files.fs.open_input_file(path))
        return lambda start, end: bytes(file.read_at(end - start, start))
    return lambda start, end: bytes(files.cat_file(path, start=start, end=end))


def patient(
    ask: Callable[[], _T], tries: int = TRIES, also: tuple[type[Exception], ...] = ()
) -> _T:
    """Try again what fails for a moment, by the network's errors and others that are named."""
    failures: tuple[type[Exception], ...] = (OSError, EOFError, *_passing(), *also)
    for trial in range(tries):
        try:
            return ask()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except failures as error:
            if trial == tries - 1 or getattr(error, "status", 503) not in _BUSY:
                raise
            time.sleep(FIRST_WAIT_S * 2**trial)
    raise AssertionError("every trial returns or raises")


def _passing() -> tuple[type[Exception], ...]:
    """Return what is raised when a connection fails."""
    import aiohttp

    return (
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        aiohttp.ClientResponseError,
        asyncio.IncompleteReadError,
        asyncio.TimeoutError,
        _BusyError,
    )


async def _all_parts(files: Any, url: str, ranges: Ranges, size: int, version: str) -> list[bytes]:
    session = await files.set_session()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(start: int, end: int) -> bytes:
        async with gate:
            return await _part(session, url, (start, end), size, version)

    tasks = [asyncio.ensure_future(one(start, end)) for start, end in ranges]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _part(session: Any, url: str, bounds: tuple[int, int], size: int, version: str) -> bytes:
    """Ask for one range until it comes."""
    return await _tried(lambda: _ask(session, url, bounds, size, version))


async def _is_now(files: Any, url: str, size: int, version: str) -> bool:
    session = await files.set_session()

    async def head() -> bool | None:
        address, headers = _address(url)
        headers["Accept-Encoding"] = "identity"
        async with session.head(address, headers=headers, allow_redirects=True) as answer:
            if answer.status in _BUSY:
                raise _BusyError(answer.status, 0.0)
            return version_of(answer.headers) == version if answer.status < 400 else None

    found = await _tried(head)
    if found is None:  # a signature may be good for GET alone
        try:
            await _part(session, url, (0, 1), size, version)
        except _ChangedError:
            return False
        except NoRangesError:
            return True
    return found is not False


async def _tried(ask: Callable[[], Awaitable[_T]]) -> _T:
    for trial in range(TRIES):
        try:
            return await ask()
        except _passing() as error:
            if trial == TRIES - 1 or getattr(error, "status", 503) not in _BUSY:
                raise
            wait_s = error.wait_s if isinstance(error, _BusyError) else 0.0
            await asyncio.sleep(max(wait_s, FIRST_WAIT_S * 2**trial))
    raise AssertionError("every trial returns or raises")


async def _ask(session: Any, url: str, bounds: tuple[int, int], size: int, version: str) -> bytes:
    start, end = bounds
    address, headers = _address(url)
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    if version.startswith('"'):  # a weak ETag never matches
        headers["If-Match"] = version
    async with session.get(address, headers=headers) as answer:
        _check_status(answer, url)
        _check_content(answer, start, size, version)
        if is_fixed(url) and answer.history:
            _moved[url] = answer.url
        return bytes(await answer.content.readexactly(end - start))


def _check_status(answer: Any, url: str) -> None:
    if answer.status in (412, 416):
        raise _ChangedError
    if answer.status in _FORGOTTEN and _moved.pop(url, None) is not None:
        raise _BusyError(503, 0.0)
    if answer.status in _BUSY:
        after = answer.headers.get("Retry-After", "")
        wait_s = float(after) if after.isdigit() else 0.0
        raise _BusyError(answer.status, min(wait_s, _LONGEST_WAIT_S))
    answer.raise_for_status()


def _check_content(answer: Any, start: int, size: int, version: str) -> None:
    """Hold an answer's head against what was asked for."""
    if version and version_of(answer.headers) != version:
        raise _ChangedError
    given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if answer.status != 206 or given is None or int(given[1]) != start:
        raise NoRangesError
    if given[2] not in ("*", str(size)):
        raise _ChangedError


_moved: dict[str, Any] = {}
"""Files of the hub -> the signed address that it sent us to, as long as that one answers."""


def _address(url: str) -> tuple[Any, dict[str, str]]:
    """Return where a file is asked for, and what the hub wants to see beside."""
    import yarl

    hub = _HUB.fullmatch(url)
    if hub is None:
        return yarl.URL(url), {}
    if url in _moved:  # another host: the token is not for it
        return _moved[url], {}
    from huggingface_hub import constants, get_token

    repo, commit, path = hub.groups()
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{constants.ENDPOINT}/{repo}/resolve/{commit}/{quote(path)}"
    return yarl.URL(address, encoded=True), headers
