"""NF4 store: quantised weights that a later start maps, instead of reading the originals again.

In: a model folder and how it is to be loaded. Out: `nf4/KEY` in the cache folder, itself a model
folder as transformers reads it: packed weights with bitsandbytes' scales, everything else as it
was loaded, names of the native network, and a manifest of all files with their sha256.

A key holds whatever decides a byte of these weights, so what is found under it equals a fresh
quantisation. Nothing here is needed for a run to be right: what cannot be kept, or is not as it
was written, is told in a line and made again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from raytune_ft import durable, host
from raytune_ft.config import cache_room
from raytune_ft.config.cache import cache_dir
from raytune_ft.config.schema import ModelSection
from raytune_ft.model.tensor_file import blocks_of, size_of

LIMIT = "RAYTUNE_MODEL_CACHE_GIB"
"""Environment variable: GiB that all kept models together take; 0 keeps none."""
WORTH_BYTES = 2**30
"""Smaller originals are quantised in seconds, and not kept."""
SHARD_BYTES = 2**29
"""A file's tensors; several files are checked at once."""
PROBES, PROBE_BYTES = 16, 1 << 16
"""Pieces of an original that its identity holds beside size and time, and their size."""
BLOCK_BYTES = 1 << 20
"""Read at once where a kept file is checked."""
MANIFEST = "manifest.json"
COPIED = ("config.json", "generation_config.json")
"""What transformers reads of a folder beside weights."""
_CODE = ("families/*.py", "loading.py", "nf4_store.py", "tensor_file.py")
_LIBRARIES = ("bitsandbytes", "transformers")

Tensors = Mapping[str, torch.Tensor]

_log = logging.getLogger(__name__)


class Kept:
    """The place of one model's quantised weights, whether they are there or not."""

    def __init__(self, source: Path, key: str) -> None:
        self.source = source
        self.folder = cache_dir() / "nf4" / key

    @classmethod
    def of(
        cls, source: Path, files: list[Path], section: ModelSection, device: torch.device
    ) -> Kept | None:
        """Return the place of a model; None if it is not NF4, too small, or the store is off.

        Args:
            source: folder of the original.
            files: its weight files.
            section: how they are loaded, `dtype` being the one in which the model computes.
            device: where they are quantised.

        Raises:
            RecipeError: the store's environment variable is no number of GiB.
        """
        if section.quantization != "nf4":
            return None
        found = sum(file.stat().st_size for file in files)
        if found < WORTH_BYTES or not cache_room.limit_bytes(cache_dir() / "nf4", LIMIT):
            return None
        return cls(source, _key(source, files, section, device))

    def find(self) -> Path | None:
        """Return the kept folder, checked byte by byte, which also brings it into memory.

        None if it is not there, or not as it was written: that is told, and it is removed.
        """
        if not self.folder.is_dir():
            return None
        problem = _damage(self.folder)
        if problem is not None:
            self.discard(problem)
            return None
        with suppress(OSError):
            os.utime(self.folder)  # used last, removed last
        return self.folder

    def read_ahead(self) -> None:
        """Ask the system to bring what is kept into memory; do not wait for it."""
        for file in sorted(self.folder.glob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def discard(self, problem: str) -> None:
        """Remove what was kept, and say why."""
        self._tell(f"{problem}; {self.source.name} is quantised again")
        durable.drop(self.folder)

    def write(self, model: torch.nn.Module) -> None:
        """Keep a model's weights, unless another process does, or they are there.

        Tells in a line why they are not kept.
        """
        tensors = _tensors_of(model)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder.parent) as alone:
                if alone and not self.folder.exists() and self._has_room(size_of(tensors)):
                    self._write(tensors)
        except OSError as error:
            self._tell(f"cannot write: {error.strerror or error}")

    def _has_room(self, size: int) -> bool:
        part = self.folder.parent
        limit = cache_room.limit_bytes(part, LIMIT)
        durable.tidy(part)
        left = cache_room.shrink(part, self.folder.name, limit - size) if size <= limit else 0
        if left + size > limit:
            self._tell(
                f"{size / 2**30:.1f} GiB are more than the {limit / 2**30:.1f} that all models may "
                f"take; set {LIMIT} to more"
            )
        elif cache_room.free_bytes(part) < size:
            self._tell(f"the disk has no {size / 2**30:.1f} GiB free; make room, or set {LIMIT}: 0")
        else:
            return True
        return False

    def _write(self, tensors: Tensors) -> None:
        entries: dict[str, Any] = {}
        shards = _shards(tensors)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, _ in enumerate(shards, 1)]
        with durable.whole_folder(self.folder) as place:

            def put(name: str, blocks: Any) -> None:
                size, sha256 = durable.write(place / name, blocks)
                entries[name] = {"bytes": size, "sha256": sha256}

            for name, shard in zip(names, shards, strict=True):
                put(name, blocks_of(shard))
            weight_map = {
                key: name for name, shard in zip(names, shards, strict=True) for key in shard
            }
            index = {"metadata": {"total_size": size_of(tensors)}, "weight_map": weight_map}
            put("model.safetensors.index.json", [json.dumps(index).encode()])
            for name in COPIED:
                if (self.source / name).is_file():
                    put(name, [(self.source / name).read_bytes()])
            content = {"source": str(self.source), "files": entries}
            durable.write(place / MANIFEST, [json.dumps(content, indent=1).encode()])
        _log.info("model cache: %s keeps %s as NF4", self.folder, self.source.name)

    def _tell(self, why: str) -> None:
        _log.warning("model cache %s: %s", self.folder, why)


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state by name, with bitsandbytes' scales, tied weights once."""
    first = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in model.state_dict().items() if name not in every - first}


def _shards(tensors: Tensors) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and size_of(shards[-1]) + size_of({name: tensor}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a kept folder, None if every file is as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        entries = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or no manifest"

    def check(name: str) -> str | None:
        try:
            with (folder / Path(name).name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entries[name][0]:
                    return f"{name} has {size} bytes, not {entries[name][0]}"
                if _sha256(file) != entries[name][1]:
                    return f"{name} is not as it was written (sha256)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(min(16, host.cores())) as pool:
        return next((found for found in pool.map(check, entries) if found), None)


def _sha256(file: BinaryIO) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    while size := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:size])
    return digest.hexdigest()


@contextmanager
def _alone(part: Path) -> Iterator[bool]:
    """Yield whether no other process of this machine writes; where locks are unknown, True."""
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError as error:
            alone = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield alone
    finally:
        os.close(handle)


def _key(source: Path, files: list[Path], section: ModelSection, device: torch.device) -> str:
    texts = [source / name for name in COPIED if (source / name).is_file()]
    parts = {
        "code": _code_hash(),
        "libraries": [torch.__version__, *(version(name) for name in _LIBRARIES)],
        "texts": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in texts},
        "files": [_identity(file) for file in files],
        "dtype": section.dtype,
        "double_quant": section.double_quant,
        "device": _device(device),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(file: Path) -> list[Any]:
    """Return name, size, time and a hash of pieces; archives give all their files one time."""
    found, digest = file.stat(), hashlib.sha256()
    last = max(0, found.st_size - PROBE_BYTES)
    with file.open("rb") as content:
        for number in range(PROBES):
            content.seek(last * number // (PROBES - 1))
            digest.update(content.read(PROBE_BYTES))
    return [file.name, found.st_size, found.st_mtime_ns, digest.hexdigest()]


def _device(device: torch.device) -> str:
    """Name what sums scales: the order of a sum, and so its last bit, depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Return a hash of the code that names and makes tensors: a number gets forgotten."""
    folder, found = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in folder.glob(pattern)):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
