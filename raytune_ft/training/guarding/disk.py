"""Disk: whether there is room for what a run is going to write, asked before it is written.

A run is refused only where its disk is clearly too small, because the estimate is one; a save is
refused where its own bytes, which are known, do not fit. Both in one line with the mount.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError
from raytune_ft.training.saving.checkpoint import mount_of

MASTER_BYTES = 4
"""A trained weight as checkpoints hold it, in float32."""
AVERAGE_BYTES = {"lion": 4.0, "muon": 4.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04}
"""Per weight, of the optimizer; AdamW keeps two of four bytes."""
SMALL_FILES = 1 << 20
"""State, metrics and their like."""
REPORT_BYTES = 8 << 20
SURE = 0.9
"""An estimate that is over the free space by less than this factor refuses nothing."""
RAY_BYTES = 64 << 20
"""Logs and sockets of a Ray session."""
RAY_FULL = 0.95
"""Share of a file system in use from which Ray keeps nothing there that does not fit into memory
(`local_fs_capacity_threshold`)."""


def checkpoint_bytes(trained: int, optimizer: str) -> int:
    """Return the size of one checkpoint of so many trained weights."""
    return math.ceil(trained * (MASTER_BYTES + AVERAGE_BYTES.get(optimizer, 8.0))) + SMALL_FILES


def run_bytes(recipe: Recipe, trained: int, steps: int) -> int:
    """Return what a run's folder grows to, at least.

    Args:
        recipe: `checkpoint`, `train` and `eval` are read.
        trained: weights.
        steps: optimizer steps of the run.
    """
    every = recipe.checkpoint.every
    saves = recipe.train.epochs if every == "epoch" else math.ceil(steps / every)
    # a new one is there before the oldest goes; of those that all stay, two are sure
    kept = 2 if recipe.checkpoint.keep == -1 else recipe.checkpoint.keep + 1
    one = checkpoint_bytes(trained, recipe.train.optimizer)
    return min(saves, kept) * one + trained * 2 + REPORT_BYTES


def check_run(folder: Path, recipe: Recipe, trained: int, steps: int) -> None:
    """Refuse a run for whose checkpoints its disk is clearly too small.

    Raises:
        CheckpointError: names the mount, what is free there and what is needed.
    """
    there = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    needed = run_bytes(recipe, trained, steps) - there
    _require(folder, needed * SURE, needed, "run.storage", "checkpoints and result")


def check_save(folder: Path, shapes: Mapping[str, torch.Size], optimizer: str) -> None:
    """Refuse to begin a checkpoint for which there is no room; as `check_run`."""
    needed = checkpoint_bytes(sum(shape.numel() for shape in shapes.values()), optimizer)
    _require(folder, needed, needed, "run.storage", "the next checkpoint")


def check_ray(folder: Path) -> str | None:
    """Look at the disk of Ray's temporary folder; return a line if Ray may run out of it.

    Raises:
        CheckpointError: Ray cannot even start there.
    """
    _require(folder, RAY_BYTES, RAY_BYTES, "RAY_TMPDIR", "Ray's session")
    usage = shutil.disk_usage(_existing(folder))
    if usage.used / usage.total < RAY_FULL:
        return None
    return (
        f"{mount_of(folder)}, where Ray keeps what does not fit into memory, is "
        f"{usage.used / usage.total:.0%} full ({_size(usage.free)} free): from {RAY_FULL:.0%} on "
        "it refuses to; set RAY_TMPDIR to another disk if this run fails"
    )


def _require(folder: Path, least: float, needed: int, setting: str, what: str) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if free < least:
        raise CheckpointError(
            f"{mount_of(folder)}: {_size(free)} free, {what} in {folder} need {_size(needed)}; "
            f"free space there, or set {setting} to another disk"
        )


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    path = folder.resolve()
    while not path.exists():
        path = path.parent
    return path


def _size(size: float) -> str:
    unit, power = ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)
    return f"{size / power:,.1f} {unit}"
