"""Outlook: what can be said of a run's memory and time on this machine before anything loads.

`plan` shows it at length, `train` in a line, and `train` refuses what clearly cannot fit. GPUs are
asked about by the driver's tool only (`config.estimates.gpus`): no process but a worker holds a
CUDA context.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_ft import host, resources, survey
from raytune_ft.config import catalog
from raytune_ft.config.estimates import gpus, pace
from raytune_ft.config.estimates import layout as layouts
from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.layout import Choice
from raytune_ft.config.estimates.pace import Device
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError, ModelError, RecipeError

if TYPE_CHECKING:
    from raytune_ft.row_counts import Counted

GIB = 2**30
CLEARLY = 1.05
"""Times the memory there is, above which a prediction is a refusal."""


@dataclass(frozen=True)
class Place:
    """Where a run is to be."""

    memory: int | None
    """Bytes of each GPU; None: there is none."""
    device: Device | None
    """None where its rates are not known."""
    free: int | None = None
    """Bytes of each GPU that no process holds; None: not known."""


@dataclass(frozen=True)
class Pace:
    """Predicted time."""

    device: str
    is_measured: bool
    """Whether the device's rates were measured; else its data sheet gives them."""
    micro_s: float
    update_s: float
    tokens_per_s: float
    """Per worker, of full packs."""
    epoch_s: float | None
    """None where the rows are not here."""


@dataclass(frozen=True)
class Outlook:
    """What `train` says first."""

    needed: int
    """Bytes per worker."""
    available: int
    place: Place
    counts: Counts
    parts: dict[str, int]
    """Bytes per worker by part, which the report lays beside what was measured."""
    choice: Choice | None = None
    """The automatic layout; None on a CPU, and where the recipe lays itself out."""

    def line(self) -> str:
        """Say what a run needs of what there is, and how its steps are laid out."""
        where = "each GPU" if self.place.memory is not None else "this machine"
        said = (
            f"plan    about {self.needed / GIB:.1f} GiB of memory per worker; {where} has "
            f"{self.available / GIB:.1f} GiB"
        )
        return said if self.choice is None else f"{said}\nplan    {self.choice.line}"

    def time(self, recipe: Recipe, steps: int) -> str | None:
        """Say how long the steps of a run will take; None where the device's rates are unknown."""
        device = self.place.device
        if device is None:
            return None
        own = layouts.own_layout(recipe, self.counts.layers)
        chosen = own if self.choice is None else self.choice.layout
        seconds = steps * layouts.weigh(recipe, self.counts, device, chosen).seconds
        return f"plan    ~{steps:,} steps, about {spoken(seconds)} on {device.name}"


def place(
    gpu_memory: str | None = None, gpu: str | None = None, *, may_measure: bool = False
) -> Place:
    """Return the place that a user names, or else this machine's GPUs, the smallest of them.

    Args:
        gpu_memory: as a user types it; None: as much as the GPU has.
        gpu: a name of `pace.DEVICES`.
        may_measure: whether this process may hold a CUDA context, to measure a GPU's rates.

    Raises:
        RecipeError: no such GPU is known, or the size is none.
    """
    memory = survey.parse_size(gpu_memory, "--gpu-memory") if gpu_memory else None
    if gpu is not None:
        device = pace.device_called(gpu)
        if device is None:
            known = ", ".join(pace.DEVICES)
            raise RecipeError(f"--gpu: no rates of '{gpu}' are known; choose: {known}")
        return Place(memory or device.memory, device)
    found = gpus.visible()
    if not found:
        return Place(memory, None)
    smallest = min(found, key=lambda one: one.memory)
    measured = _measured() if may_measure else None
    device = measured or pace.device_called(smallest.name)
    if memory is not None:
        return Place(memory, device)
    free = min(one.memory if one.free is None else one.free for one in found)
    return Place(smallest.memory, device, free)


def check_float8(recipe: Recipe, device: Device | None) -> None:
    """Refuse `model.compute: fp8` for a GPU without it, as a worker does there; ModelError."""
    if recipe.model.compute != "fp8" or device is None or device.has_float8:
        return
    have, need = (".".join(map(str, one)) for one in (device.capability, pace.FLOAT8_FROM))
    raise ModelError(
        f"model.compute 'fp8': {device.name} has compute capability {have}, float8 needs {need} or "
        "more; leave it out here"
    )


def _measured() -> Device | None:
    """Measure the first GPU; None where it is full, or torch cannot use it."""
    import torch

    from raytune_ft.model.probe import probe

    try:
        return probe(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    except RuntimeError:
        return None


def pace_of(
    recipe: Recipe,
    counts: Counts,
    where: Place,
    rows: Counted | None,
    choice: Choice | None = None,
) -> Pace | None:
    """Predict the time of a run in its own layout; None where the device's rates are not known.

    Args:
        recipe: in its layout.
        counts: of its model.
        where: it runs.
        rows: it trains on.
        choice: what says whether a base is unpacked once, and what lies on the host.
    """
    if where.device is None:
        return None
    fill = _fill(recipe, rows)
    way = {} if choice is None else choice.layout.way
    micro = pace.micro_seconds(recipe, counts, where.device, **way)
    packs = rows.packs if rows is not None else None
    epoch = None
    if packs is not None:
        epoch = pace.epoch_seconds(recipe, counts, where.device, packs, fill, **way)
    return Pace(
        where.device.name,
        where.device.is_measured,
        micro,
        pace.update_seconds(recipe, counts, where.device, hosted=way.get("hosted", ())),
        recipe.train.micro_batch_size * recipe.data.max_length / micro,
        epoch,
    )


def check_memory(recipe: Recipe, kept: Choice | None = None) -> Outlook | None:
    """Predict whether a run fits this machine, and in which layout, before anything loads.

    None: nothing can be said here, since the model's shape is not known or the workers are on
    other machines.

    Args:
        recipe: of the run.
        kept: the layout of a run that is to go on, with which it goes on exactly.

    Raises:
        RecipeError: there are fewer GPUs here than workers.
        MemoryPlanError: it clearly does not fit, in halves neither if `train.on_oom` is `halve`.
        ModelError: no family reads the model's config.json, or the GPU has no float8.
    """
    if os.environ.get("RAY_ADDRESS"):
        return None
    resources.check(recipe)
    folder = survey.model_folder(recipe.model.path)
    shape = survey.read_config(folder) if folder else catalog.card_config(recipe.model.path)
    where = place()
    check_float8(recipe, where.device)
    together = 1 if where.memory is not None else recipe.run.workers
    available = where.memory or host.memory()
    if shape is None or available is None:
        return None
    from raytune_ft.model.memory import plan_memory

    if kept is not None and where.memory is not None and kept.memory > where.memory:
        kept = None  # the worker says so
    found = plan_memory(recipe, shape, where.memory, where.device, free_bytes=where.free, kept=kept)
    needed = found.total * together
    for smaller in _halves(recipe) if found.choice is None else []:
        if needed <= available * CLEARLY:
            break
        needed = plan_memory(smaller, shape, where.memory, where.device).total * together
    if needed > available * CLEARLY:
        what = "each GPU" if where.memory is not None else "this machine"
        advice = f"set {found.proposals[0].line}" if found.proposals else _cpu_advice(recipe)
        raise MemoryPlanError(
            f"{recipe.model.path}: needs about {needed / GIB:.1f} GiB, {what} has "
            f"{available / GIB:.1f} GiB; {advice}"
        )
    return Outlook(
        needed // together, available, where, found.counts, dict(found.parts), found.choice
    )


def spoken(seconds: float) -> str:
    """Write a time as people say it: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def _halves(recipe: Recipe) -> list[Recipe]:
    """Return the recipe as `train.on_oom: halve` would change it, again and again."""
    found, train = [], recipe.train
    while train.on_oom == "halve" and train.micro_batch_size > 1:
        factor = next(n for n in range(2, train.micro_batch_size + 1)
                      if train.micro_batch_size % n == 0)  # fmt: skip
        train = train.model_copy(
            update={
                "micro_batch_size": train.micro_batch_size // factor,
                "accumulation": train.accumulation * factor,
            }
        )
        found.append(recipe.model_copy(update={"train": train}))
    return found


def _cpu_advice(recipe: Recipe) -> str:
    if recipe.model.quantization == "none" and recipe.model.method == "lora":
        return "set model.quantization=nf4, or use a smaller model"
    return f"set data.max_length={max(8, recipe.data.max_length // 2)}, or use a smaller model"


def _fill(recipe: Recipe, rows: Counted | None) -> float:
    """Return tokens over room where packs are as short as their rows; padding runs else."""
    if recipe.data.packing != "none" or rows is None or rows.density is None:
        return 1.0
    return rows.density
