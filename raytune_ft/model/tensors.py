"""Tensor files: one tensor at a time in, shards of a bounded size out, one tensor in memory.

Files are read and written by plain calls, not mapped: pages of a mapped file count as memory of
the process, and a model's files are larger than what there is.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.tensor_file import ALIGNMENT, NAMES

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
"""What torch's restricted unpickler says about a class that it does not build."""
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
NAME_OF = {**NAMES, torch.float8_e4m3fn: "F8_E4M3"}
DTYPES = {name: dtype for dtype, name in NAME_OF.items()}
"""Types of tensors by their names in safetensors files."""
HEAD_BYTES = range(4096, 256 << 10)
"""Kept free for a file's head while its tensors are written: a thousandth of the file."""
COPY_BYTES = 16 << 20


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that others may read; safetensors alone makes it private."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError or OSError if that is impossible."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return tensors


def stream_tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of weight files, one tensor in memory at a time.

    Tensors of safetensors files come in the order of their names.
    """
    pickled = [file for file in files if file.suffix != ".safetensors"]
    yield from _read_safetensors([file for file in files if file not in pickled])
    for file in pickled:
        for name, tensor in load_pickled(file).items():
            yield name, tensor.clone()


def _read_safetensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        places: dict[str, tuple[IO[bytes], int, dict[str, Any]]] = {}
        for file in files:
            content: IO[bytes] = stack.enter_context(file.open("rb", buffering=0))
            head = _head_of(content, file)
            places |= {name: (content, content.tell(), entry) for name, entry in head.items()}
        for name, (source, start, entry) in sorted(places.items()):
            begin, end = entry["data_offsets"]
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            room = tensor.reshape(-1).view(torch.uint8).numpy().data
            source.seek(start + begin)
            if len(room) != end - begin or _fill(source, room) != len(room):
                raise ModelError(f"{source.name}: '{name}' is cut off; copy the file again")
            yield name, tensor
            del tensor, room  # or the next one is read while this one is held


def _head_of(content: IO[bytes], file: Path) -> dict[str, Any]:
    size = int.from_bytes(content.read(8), "little")
    try:
        if size > file.stat().st_size:
            raise ValueError("a head longer than the file")
        head: dict[str, Any] = json.loads(content.read(size))
        head.pop("__metadata__", None)
        wrong = {entry["dtype"] for entry in head.values()} - set(DTYPES)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); copy the file again") from None
    if wrong:
        raise ModelError(
            f"{file}: holds tensors of type {min(wrong)}, which are not readable; take the model "
            "in float32, float16 or bfloat16"
        )
    return head


def _fill(content: Any, room: memoryview) -> int:
    """Read until `room` is full or the file ends; return what was read."""
    done = 0
    while done < len(room):
        count = content.readinto(room[done : done + COPY_BYTES])
        if not count:
            break
        done += count
    return done


def tensor_names(files: Sequence[Path]) -> dict[str, torch.Size]:
    """Return names and shapes of weight files' tensors, in the order of `stream_tensors`."""
    found: dict[str, torch.Size] = {}
    pickled = [file for file in files if file.suffix != ".safetensors"]
    for file in files:
        if file not in pickled:
            with file.open("rb", buffering=0) as content:
                head = _head_of(content, file)
            found |= {name: torch.Size(entry["shape"]) for name, entry in head.items()}
    found = dict(sorted(found.items()))
    for file in pickled:
        found |= {name: tensor.shape for name, tensor in load_pickled(file).items()}
    return found


def load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """Open a file of pickled tensors with torch's restricted unpickler, which runs no code.

    The tensors stay in the file until they are used, but in files older than PyTorch 1.6.

    Raises:
        ModelError: the unpickler refuses the file, or it holds something else than tensors.
    """
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except UnpicklingError as error:
        found = FOREIGN.search(str(error))
        raise ModelError(
            f"{file}: holds more than tensors ({found[1] if found else 'no pickle of tensors'}), "
            "and torch.load(weights_only=True) runs no code; take the model's safetensors files"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{file}: cannot be read ({reason}); copy the file again") from None
    if not isinstance(content, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{file}: holds something else than tensors by name; copy the file again")
    return content


def size_bytes(text: str) -> int:
    """Return the bytes of `2GB`, `500MB` or `1GiB`; RecipeError if it is not a size."""
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"max shard size '{text}': not a size; write 2GB, 500MB or 1GiB")
    unit = match[2].upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match[1]) * base ** UNITS[unit.removesuffix("B").removesuffix("I")])


class ShardWriter:
    """Write tensors into numbered safetensors files of bounded size, with their index.

    Each tensor goes to its file at once; a file's head is put in front of them when it is full.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self.names: set[str] = set()
        self._room = min(max(max_bytes // 1000, HEAD_BYTES.start), HEAD_BYTES.stop)
        self._room -= self._room % ALIGNMENT
        self._file: IO[bytes] | None = None
        self._head: dict[str, Any] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, into a new file where it would not fit into this one."""
        size = tensor.numel() * tensor.element_size()
        if self._head and self._bytes + size > self.max_bytes:
            self._finish()
        if self._file is None:
            self._file = self._part(len(self._shards)).open("w+b", buffering=0)
            self._file.seek(self._room)
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _write_all(self._file, flat.numpy().data)
        self._head[name] = {
            "dtype": NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._bytes, self._bytes + size],
        }
        self._bytes += size
        self.total_bytes += size
        self.names.add(name)

    def close(self) -> int:
        """Give the files their heads and names, and return their number."""
        self._finish()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return 1
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self.folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
        return count

    def _finish(self) -> None:
        if self._file is None:
            return
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._head}).encode()
        room = max(self._room, -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT)
        with self._file as file:
            _move(file, self._room, self._bytes, room)
            file.seek(0)
            # blanks behind the head are the format's own way to keep tensors in their places
            _write_all(file, memoryview((room - 8).to_bytes(8, "little") + text.ljust(room - 8)))
        self._shards.append(list(self._head))
        self._file, self._head, self._bytes = None, {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def _move(file: IO[bytes], start: int, size: int, to: int) -> None:
    """Move `size` bytes of a file from `start` to a later place, last block first."""
    if to == start or not size:
        return
    last = (size - 1) - (size - 1) % COPY_BYTES
    for begin in range(last, -1, -COPY_BYTES):
        room = memoryview(bytearray(min(COPY_BYTES, size - begin)))
        file.seek(start + begin)
        _fill(file, room)
        file.seek(to + begin)
        _write_all(file, room)


def _write_all(file: IO[bytes], content: memoryview) -> None:
    while content:
        content = content[file.write(content[:COPY_BYTES]) :]
