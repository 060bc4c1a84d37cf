"""Layouts of runs: which one a run's steps have on this device, decided before anything is loaded.

A run keeps the layout that it began with, in `run.json`: with another one, sums are rounded in
another order and dropout draws otherwise, so only then it goes on to the byte. Rank 0 decides by
the GPU that has the least free memory; all ranks follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raytune_ft.config.estimates import pace
from raytune_ft.config.estimates.layout import GIB, Choice, asked, choose
from raytune_ft.config.schema import Recipe
from raytune_ft.model.memory import Shape
from raytune_ft.training.engine import rank, world_size
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.vitals import exchange

Tell = Callable[[str], object]


def kept_choice(folder: RunFolder, recipe: Recipe) -> Choice | None:
    """Return the layout that a run began with; None if it has none, or is asked for another."""
    content = folder.info().get("layout") if folder.run_json.is_file() else None
    if content is None or content["asked"] != asked(recipe):
        return None
    return Choice.from_json(content)


def settled(
    recipe: Recipe,
    folder: RunFolder,
    model_folder: Path,
    device: torch.device,
    tell: Tell,
    share: float = 1.0,
) -> Choice | None:
    """Return the layout of a run, the same on all ranks, which have to call it together.

    None: the recipe's own numbers, as it asks for, and always on a CPU.

    Args:
        recipe: as it was asked for.
        folder: of the run; what is decided anew is written there.
        model_folder: with config.json.
        device: of this rank.
        tell: says what is decided here, on rank 0.
        share: of the device, that this process may use.
    """
    if recipe.train.layout == "recipe" or device.type != "cuda":
        return None
    free, total = least_memory(device, share)
    choice = None
    if rank() == 0:
        choice = decided(recipe, folder, model_folder, (free, total), _device_of(device), tell)
    return _from_rank_0(choice, device)


def decided(
    recipe: Recipe,
    folder: RunFolder,
    model_folder: Path,
    memory: tuple[int, int],
    device: pace.Device,
    tell: Tell,
) -> Choice:
    """Return the layout that a run began with, or choose one and write it down.

    Args:
        recipe: as it was asked for.
        folder: of the run.
        model_folder: with config.json.
        memory: free bytes and all bytes of the smallest device.
        device: whose rates decide what is fast.
        tell: as in `settled`.
    """
    free, total = memory
    kept = kept_choice(folder, recipe)
    if kept is not None and kept.memory <= total:
        return kept
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    chosen = choose(recipe, Shape(config).counts(recipe), free, device)
    if kept is not None:
        tell(smaller_device(kept, total))
    tell(f"plan    {chosen.line}")
    folder.update(layout=chosen.to_json())
    return chosen


def smaller_device(kept: Choice, total: int) -> str:
    """Say why a run does not keep the layout that it began with."""
    return (
        f"this run began with {kept.layout.said(kept.layers)}, about {kept.memory / GIB:.1f} GiB; "
        f"a GPU here has {total / GIB:.1f} GiB, so it goes on in another layout: the same steps, "
        "not the same bytes"
    )


def least_memory(device: torch.device, share: float) -> tuple[int, int]:
    """Return the free bytes and all bytes that the rank with the least may use."""
    free, total = torch.cuda.mem_get_info(device)
    total = int(total * share)
    table = exchange(torch.tensor([min(free, total), total], dtype=torch.int64), device)
    frees, totals = zip(*table, strict=True)
    return int(min(frees)), int(min(totals))


def _device_of(device: torch.device) -> pace.Device:
    """Return the rates of a GPU, the H200's where they are not known: the order hardly changes."""
    return pace.device_called(torch.cuda.get_device_name(device)) or pace.DEVICES["h200"]


def _from_rank_0(choice: Choice | None, device: torch.device) -> Choice | None:
    if world_size() == 1:
        return choice
    cell: list[Any] = [choice]
    dist.broadcast_object_list(cell, src=0, device=device)
    found: Choice | None = cell[0]
    return found
