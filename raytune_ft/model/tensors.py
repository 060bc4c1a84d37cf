"""Tensor files: one at a time in, shards of a bounded size out."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from raytune_ft.errors import ModelError, RecipeError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
"""What torch's restricted unpickler says about a class that it does not build."""
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


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


def stream_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of weight files, one tensor in memory at a time."""
    from safetensors import safe_open

    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  not a mapping
                    yield name, content.get_tensor(name)
        else:
            for name, tensor in load_pickled(file).items():
                yield name, tensor.clone()


def tensor_names(files: Iterable[Path]) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors in weight files without reading them."""
    from safetensors import safe_open

    found: dict[str, torch.Size] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  not a mapping
                    found[name] = torch.Size(content.get_slice(name).get_shape())
        else:
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
    """Write tensors into numbered safetensors files of bounded size, with their index."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self.names: set[str] = set()
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; a shard is written when the next tensor would not fit into it."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += size
        self.total_bytes += size
        self.names.add(name)

    def close(self) -> int:
        """Write what is held, give the files their names, and return their number."""
        self._flush()
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

    def _flush(self) -> None:
        save_tensors(self._held, self._part(len(self._shards)))
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"
