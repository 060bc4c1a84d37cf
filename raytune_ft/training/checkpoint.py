"""Checkpoints: a folder counts only when its manifest, written last, agrees with its files.

`step_000015/` holds `weights.safetensors` (trained tensors), `optimizer.safetensors`,
`state.json` and `manifest.json` (size and sha256 of each). It is written under another name on
the same file system, flushed to disk and renamed, so a crash at any instant leaves either the
whole checkpoint or none. Tensors are safetensors and the rest is JSON: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raytune_ft.data.report import Report, new_report
from raytune_ft.errors import CheckpointError

MANIFEST = "manifest.json"
STEP_PREFIX = "step_"


@dataclass
class TrainState:
    """What a run must know to go on exactly; everything else follows from the recipe."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    window: int = 0
    pack: int = 0
    """Position of the next pack in the data stream."""
    progress: float = 0.0
    """Epochs of rows visited."""
    warm: float | None = None
    """Share of the run at which the warm-up ended."""
    rows: Report = field(default_factory=new_report)
    """What became of the rows of the first epoch, so far."""
    packs: int = 0
    """Packs of the first epoch, so far."""
    pack_tokens: int = 0
    """Tokens in them."""
    tokens: int = 0
    """Tokens seen so far, all ranks."""
    targets: int = 0
    """Labelled tokens among them."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps, as `stopping` remembers them."""
    best: float | None = None
    """Best value of `eval.metric` so far."""
    best_step: int = 0
    waited: int = 0
    """Measurements since the best one."""
    stopped: bool = False
    """Whether `eval.patience` has ended the run."""
    recipe_hash: str = ""
    packs_per_step: int = 0
    data_fingerprint: str = ""
    """Of the rows that the position counts in."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read back and verified."""

    state: TrainState
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def save(
    root: Path,
    state: TrainState,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the `keep` newest valid ones.

    A `keep` of -1 removes none; the one of `state.best_step` stays in any case.

    Raises:
        CheckpointError: the disk refuses; names the folder. Earlier checkpoints are untouched.
    """
    final = root / folder_name(state.step)
    temporary = root / f".writing_{final.name}_{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".writing_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        save_file(_plain(weights), temporary / "weights.safetensors")
        save_file(_plain(optimizer), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
        _seal(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror}); free space there or set run.storage"
        ) from error
    for old in valid_steps(root)[:-keep] if keep > 0 else []:
        if old.name != folder_name(state.best_step):
            shutil.rmtree(old, ignore_errors=True)
    return final


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"{STEP_PREFIX}{step:06d}"


def load(folder: Path) -> Loaded:
    """Read a checkpoint back; CheckpointError names the first file that is not as written."""
    problem = damage(folder)
    if problem:
        raise CheckpointError(f"{folder}: {problem}; use an earlier checkpoint")
    state = TrainState(**json.loads((folder / "state.json").read_text()))
    return Loaded(
        state,
        load_file(folder / "weights.safetensors"),
        load_file(folder / "optimizer.safetensors"),
    )


def latest(root: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None."""
    steps = valid_steps(root)
    return steps[-1] if steps else None


def valid_steps(root: Path) -> list[Path]:
    """Return all checkpoints that verify, oldest first."""
    found = sorted(root.glob(f"{STEP_PREFIX}*")) if root.is_dir() else []
    return [folder for folder in found if damage(folder) is None]


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None if its files are what the manifest says."""
    try:
        text = (folder / MANIFEST).read_text()
        entries = json.loads(text)["files"]
        if text != _manifest(entries):
            return f"{MANIFEST} has changed since it was written"
    except FileNotFoundError:
        return f"no {MANIFEST}: the save was interrupted"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return f"'{name}' is missing or has another size"
        if _sha256(path) != entry["sha256"]:
            return f"'{name}' has changed since it was written"
    return None


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _seal(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    entries = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    for path in files:
        _fsync(path)
    manifest = folder / MANIFEST
    manifest.write_text(_manifest(entries))
    _fsync(manifest)
    _fsync(folder)


def _manifest(entries: dict[str, dict[str, Any]]) -> str:
    """Write the manifest's one possible text for these files, guarded by a hash of its own."""
    files = json.dumps(entries, sort_keys=True)
    own = hashlib.sha256(files.encode()).hexdigest()
    return json.dumps({"version": 1, "sha256": own, "files": json.loads(files)}, indent=1)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
