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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from raytune_ft.data.report import Report, new_report
from raytune_ft.durable import BLOCK_BYTES
from raytune_ft.errors import CheckpointError
from raytune_ft.model.tensor_file import blocks_of, size_of
from raytune_ft.training.guarding.pulse import PULSE
from raytune_ft.training.run_folder import MANIFEST, STEP_PREFIX
from raytune_ft.training.saving import durable

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_bring: list[Callable[[Path], object]] = []
"""Of this process, which is one rank."""
FORMAT = 2
"""Of state.json; 1 had no `format`."""


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
    best_metric: str = ""
    """Which metric that is the best of."""
    waited: int = 0
    """Measurements since the best one."""
    stopped: bool = False
    """Whether `eval.patience` has ended the run."""
    recipe_hash: str = ""
    packs_per_step: int = 0
    data_fingerprint: str = ""
    """Of the rows that the position counts in."""
    format: int = FORMAT
    """Of state.json, when this was written."""


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
    """Write the checkpoint of `state.step`; when it reads back, remove all but the `keep` newest.

    A `keep` of -1 removes none; the one of `state.best_step` stays in any case.

    Raises:
        CheckpointError: the disk refuses, or gives back something else; names the folder and the
            bytes. Earlier checkpoints are untouched.
    """
    final = root / folder_name(state.step)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with durable.whole_folder(final) as temporary:
            _fill(temporary, state, weights, optimizer)
    except OSError as error:
        needed = size_of(weights) + size_of(optimizer)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror}): it needs {_mib(needed)}, "
            f"{_mib(_free(root))} are free on {mount_of(root)}; free space there or set run.storage"
        ) from error
    problem = damage(final)
    if problem:
        raise CheckpointError(
            f"{final}: {problem}: the disk does not keep what is written to it; set run.storage"
        )
    if keep > 0:
        _prune(root, state, keep)
    return final


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"{STEP_PREFIX}{step:06d}"


@contextmanager
def brought_by(bring: Callable[[Path], object]) -> Iterator[None]:
    """While the block runs, have a checkpoint brought that another machine wrote, if it is loaded.

    For a rank on a machine that does not have the run's folder.
    """
    _bring.append(bring)
    try:
        yield
    finally:
        _bring.remove(bring)


def load(folder: Path) -> Loaded:
    """Read a checkpoint back; CheckpointError names the first file that is not as written."""
    if not folder.is_dir():
        for bring in _bring:
            bring(folder)
    problem = damage(folder)
    if problem:
        raise CheckpointError(f"{folder}: {problem}; use an earlier checkpoint")
    return Loaded(read_state(folder), load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER))


def hand_on(source: Path, root: Path, *, recipe_hash: str) -> Path:
    """Give another run a checkpoint, whose state then says that it is of that run's recipe.

    Tensors are not written again where the file system has links: a checkpoint's files are never
    changed, only removed.

    Args:
        source: the checkpoint.
        root: folder of the other run's checkpoints; one of the same step there is replaced.
        recipe_hash: of the other run.

    Raises:
        CheckpointError: the checkpoint is damaged, or the disk refuses.
    """
    if problem := damage(source):
        raise CheckpointError(f"{source}: {problem}; no other run can go on from it")
    state = replace(read_state(source), recipe_hash=recipe_hash)
    entries = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
    final = root / source.name
    try:
        with durable.whole_folder(final) as temporary:
            for name in (WEIGHTS, OPTIMIZER):
                _link(source / name, temporary / name)
            size, sha256 = durable.write(temporary / STATE, [_state(state)])
            entries[STATE] = {"size": size, "sha256": sha256}
            durable.write(temporary / MANIFEST, [_manifest(entries).encode()])
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror}); free space on {mount_of(root)}"
        ) from error
    return final


def load_latest(root: Path, tell: Callable[[str], None] = lambda _: None) -> Loaded | None:
    """Read the newest checkpoint that verifies, or None; `tell` is told of those that do not."""
    for folder in reversed(step_folders(root)):
        problem = damage(folder)
        if problem is None:
            return Loaded(
                read_state(folder), load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
            )
        tell(f"{folder}: {problem}; it is left out")
    return None


def latest(root: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None."""
    newest_first = reversed(step_folders(root))
    return next((folder for folder in newest_first if damage(folder) is None), None)


def step_folders(root: Path) -> list[Path]:
    """Return what has a checkpoint's name, oldest first, and look into none."""
    found = root.glob(f"{STEP_PREFIX}*") if root.is_dir() else []
    return sorted((p for p in found if p.name[len(STEP_PREFIX) :].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the optimizer step that a checkpoint's name tells."""
    return int(folder.name.removeprefix(STEP_PREFIX))


def read_state(folder: Path) -> TrainState:
    """Read a checkpoint's state; CheckpointError if another version of this program wrote it."""
    content: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    known = {found.name for found in fields(TrainState)}
    if unknown := sorted(set(content) - known):
        raise CheckpointError(
            f"{folder}: a newer version of raytune_ft wrote it (its state has '{unknown[0]}'); "
            "go on with that version"
        )
    return TrainState(**{"format": 1, **content})


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Say what is wrong with a checkpoint, or None if its files are what the manifest says.

    Without `contents` only names and sizes are compared, which takes no time.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        if text != _manifest(entries):
            return f"{MANIFEST} has changed since it was written"
    except FileNotFoundError:
        return f"no {MANIFEST}: the save was interrupted"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    found = (_file_damage(folder / name, entry, contents) for name, entry in entries.items())
    return next((problem for problem in found if problem is not None), None)


def _file_damage(path: Path, entry: Mapping[str, Any], contents: bool) -> str | None:
    if not path.is_file() or path.stat().st_size != entry["size"]:
        return f"'{path.name}' is missing or has another size"
    try:
        same = not contents or sha256_of(path) == entry["sha256"]
    except OSError as error:
        return f"'{path.name}' cannot be read ({error.strerror})"
    return None if same else f"'{path.name}' has changed since it was written"


def mount_of(folder: Path) -> Path:
    """Return the mount that a folder, there or not yet, is on."""
    path = folder.resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _fill(
    folder: Path,
    state: TrainState,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
) -> None:
    contents = {
        WEIGHTS: blocks_of(weights),
        OPTIMIZER: blocks_of(optimizer),
        STATE: iter([_state(state)]),
    }
    entries: dict[str, dict[str, Any]] = {}
    for name, blocks in contents.items():
        size, sha256 = durable.write(folder / name, blocks)
        entries[name] = {"size": size, "sha256": sha256}
    durable.write(folder / MANIFEST, [_manifest(entries).encode()])


def _state(state: TrainState) -> bytes:
    return json.dumps(asdict(state), indent=1).encode()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        with source.open("rb") as file:
            durable.write(target, iter(partial(file.read, BLOCK_BYTES), b""))


def _prune(root: Path, state: TrainState, keep: int) -> None:
    """Remove what is older than the `keep` newest; the newest of all has just been verified."""
    whole = [step_of(f) for f in step_folders(root) if damage(f, contents=False) is None]
    oldest_kept = whole[-keep] if len(whole) > keep else 0
    for folder in step_folders(root):
        if step_of(folder) < oldest_kept and step_of(folder) != state.best_step:
            durable.drop(folder)


def _manifest(entries: dict[str, dict[str, Any]]) -> str:
    """Write the manifest's one possible text for these files, guarded by a hash of its own."""
    files = json.dumps(entries, sort_keys=True)
    own = hashlib.sha256(files.encode()).hexdigest()
    return json.dumps({"version": 1, "sha256": own, "files": json.loads(files)}, indent=1)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            PULSE.beat()
    return digest.hexdigest()


def _free(folder: Path) -> int:
    return shutil.disk_usage(mount_of(folder)).free


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
