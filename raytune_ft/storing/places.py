"""Places: an address such as s3://bucket/runs in, a folder of files there out.

Arrow's file systems do the work. Endpoint, keys and region come from the environment, under the
names that AWS and Google gave them, and never from a recipe. What goes wrong is one line.

    s3://bucket/folder    S3 and what speaks like it: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...
    gs://bucket/folder    Google: GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.files.remote import s3_files
from raytune_ft.errors import CheckpointError, RecipeError

SCHEMES = ("s3", "gs")
FIELD = "run.storage"
HERE = "file://"
BLOCK_BYTES = 8 << 20
"""Given to Arrow at once; its S3 client sends parts of about as much."""
PATIENCE_S = 20
"""For a server that does not answer, before a request counts as failed."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_REASONS = (
    (r"NO_SUCH_BUCKET|bucket does not exist", "no such bucket"),
    (
        r"ACCESS_DENIED|INVALID_\w*KEY|InvalidAccessKeyId|SIGNATURE|CREDENTIALS"
        r"|PERMISSION_DENIED|UNAUTHENTICATED|status (401|403)",
        "no rights there with the credentials of the environment",
    ),
    (
        r"NETWORK_CONNECTION|REQUEST_TIMEOUT|UNAVAILABLE|curl|CURL|resolve|connect",
        "no connection to the server",
    ),
)
"""Words in Arrow's messages, and what they mean; the text itself goes on with addresses."""

Beat = Callable[[int], object]
"""Is told of bytes that went; what it raises ends the transfer."""


class Folder(Protocol):
    """Files elsewhere by their names, which use `/`, relative to one folder."""

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all files under a prefix, which is a folder's name, sorted."""

    def read(self, name: str) -> bytes:
        """Return a file's content; FileNotFoundError if it is not there."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, in place of a former one."""

    def send(self, local: Path, name: str, beat: Beat = ...) -> None:
        """Put a file of this machine there, block by block."""

    def fetch(self, name: str, local: Path, beat: Beat = ...) -> None:
        """Bring a file here, block by block; folders above it are made."""

    def delete(self, prefix: str) -> None:
        """Remove a file, or all under a folder's name; nothing there is no mistake."""


def is_elsewhere(storage: str) -> bool:
    """Tell whether an address is not a folder of this machine; RecipeError if nobody knows it."""
    match = _ADDRESS.fullmatch(storage)
    if match is None or storage.startswith(HERE):
        return False
    if match[1].lower() not in SCHEMES:
        raise RecipeError(
            f"{FIELD}: '{match[1]}' is no scheme that runs are kept under; use a folder, "
            + " or ".join(f"{scheme}://bucket/folder" for scheme in SCHEMES)
        )
    return True


def local_path(storage: str) -> Path:
    """Return the folder of this machine that an address names."""
    return Path(storage.removeprefix(HERE)).expanduser().resolve()


def local_copy(storage: str, name: str) -> Path:
    """Return where a run that is kept elsewhere stands while it is worked on here."""
    digest = hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:16]
    return cache_dir() / "runs" / digest / name


def split_run(address: str) -> tuple[str, str]:
    """Return the storage and the name of a run's address; RecipeError if it has no name."""
    storage, _, name = address.rstrip("/").rpartition("/")
    if not name or storage.endswith(("/", ":")):
        raise RecipeError(f"{address}: names no run; give STORAGE/NAME, as s3://bucket/runs/NAME")
    return storage, name


class Place:
    """A folder of an object store.

    Args:
        address: `s3://bucket/folder` or `gs://bucket/folder`.

    Raises:
        RecipeError: the address is none of these.
    """

    def __init__(self, address: str) -> None:
        if not is_elsewhere(address):
            raise RecipeError(f"{FIELD}: '{address}' is a folder of this machine")
        scheme, _, rest = address.rstrip("/").partition("://")
        self.address = f"{scheme.lower()}://{rest}"
        self.bucket = rest.partition("/")[0]
        if _BUCKET.fullmatch(self.bucket) is None:
            raise RecipeError(
                f"{FIELD}: '{self.address}': '{self.bucket}' cannot be a bucket's name"
            )
        self.root = rest
        with self._one_line():
            self._files = _file_system(scheme.lower(), self.bucket)

    def __truediv__(self, name: str) -> Place:
        """Return a folder inside this one."""
        inside = object.__new__(Place)
        inside.__dict__.update(self.__dict__)
        inside.address, inside.root = f"{self.address}/{name}", f"{self.root}/{name}"
        return inside

    def check(self) -> None:
        """See that the bucket is there and can be reached.

        Raises:
            CheckpointError: no such bucket, no rights, no connection.
        """
        from pyarrow import fs

        with self._one_line():
            found = self._files.get_file_info(self.bucket)
        if found.type == fs.FileType.NotFound:
            raise CheckpointError(f"{self.address}: no such bucket; make '{self.bucket}' first")

    def names(self, prefix: str = "") -> list[str]:
        from pyarrow import fs

        base = f"{self.root}/{prefix}".rstrip("/")
        with self._one_line():
            found = self._files.get_file_info(
                fs.FileSelector(base, recursive=True, allow_not_found=True)
            )
        files = (info.path for info in found if info.type == fs.FileType.File)
        return sorted(path[len(self.root) + 1 :] for path in files if not path.endswith("/"))

    def read(self, name: str) -> bytes:
        with self._one_line(), self._files.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def folders(self) -> list[str]:
        """Return the names of the folders right inside, sorted, without a look into them."""
        from pyarrow import fs

        with self._one_line():
            found = self._files.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(one.base_name for one in found if one.type == fs.FileType.Directory)

    def stamp(self, name: str) -> tuple[int, float] | None:
        """Return a file's bytes and the second since 1970 of its change; None: it is not there."""
        from pyarrow import fs

        with self._one_line():
            found = self._files.get_file_info(self._path(name))
        return (found.size, found.mtime.timestamp()) if found.type == fs.FileType.File else None

    def part(self, name: str, start: int, size: int) -> bytes:
        """Return up to `size` bytes of a file from `start` on; FileNotFoundError without one."""
        with self._one_line(), self._files.open_input_file(self._path(name)) as file:
            room = max(0, min(size, file.size() - start))
            return bytes(file.read_at(room, start)) if room else b""

    def write(self, name: str, content: bytes) -> None:
        with self._one_line(), self._files.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def send(self, local: Path, name: str, beat: Beat = lambda _: None) -> None:
        with (
            local.open("rb") as file,
            self._one_line(),
            self._files.open_output_stream(self._path(name)) as stream,
        ):
            while block := file.read(BLOCK_BYTES):
                stream.write(block)
                beat(len(block))

    def fetch(self, name: str, local: Path, beat: Beat = lambda _: None) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._one_line(),
            self._files.open_input_stream(self._path(name)) as stream,
            local.open("wb") as file,
        ):
            while block := stream.read(BLOCK_BYTES):
                file.write(block)
                beat(len(block))

    def delete(self, prefix: str) -> None:
        for name in self.names(prefix) or [prefix]:
            with self._one_line():
                try:
                    self._files.delete_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn what Arrow says into one line; that a file is not there stays what it is."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno is not None and error.filename is not None:
                raise  # of a file here
            raise CheckpointError(f"{self.address}: {_reason(error)}") from None


def _file_system(scheme: str, bucket: str) -> Any:
    from pyarrow import fs

    if scheme == "s3":
        return s3_files(bucket, connect_timeout=PATIENCE_S, request_timeout=PATIENCE_S)
    limit = datetime.timedelta(seconds=PATIENCE_S)
    server = os.environ.get("STORAGE_EMULATOR_HOST")
    if server is None:
        return fs.GcsFileSystem(retry_time_limit=limit)
    scheme, _, host = server.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=limit
    )


def _reason(error: OSError) -> str:
    """Say what went wrong in words of our own: Arrow's may hold a signed address."""
    text = str(error)
    for pattern, words in _REASONS:
        if re.search(pattern, text):
            return words
    code = re.search(r"AWS Error (\w+)|Status\((\w+)", text)
    return f"cannot be used ({code[1] or code[2] if code else type(error).__name__})"
