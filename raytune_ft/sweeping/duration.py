"""Duration: trials, where they run and how many at once in, when the last one ends out.

On a GPU a step is `pace`'s, slowed down by those that share it; on a CPU it is the floating-point
operations of its products over a rate that is measured here in a moment. Trials begin in their
order, each where one ended first. No torch.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from raytune_ft.config.estimates import pace
from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.setting import recomputed_layers
from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping.fit import Layouts, Machine, Model
from raytune_ft.sweeping.halving import rungs_of

START_CPU, START_GPU = 12.0, 20.0
"""Seconds in which a trial's process starts, imports and loads, alone on its core."""
TRIES, TRY_SECONDS = 5, 0.05
REACHED = 0.8
"""Share of the measured rate that a step on a CPU reaches: 2.75 s of the quickstart, by it."""


@dataclass(frozen=True)
class Cost:
    """What trials take."""

    steps: int
    tokens: int
    """In packs, padding left out."""
    seconds: float | None
    """Until the last one ends; None where no rate is known."""
    busy: float | None
    """Seconds of all trials together, each on its share of the machine."""


def cost(
    lengths: Sequence[int],
    tokens_per_step: float,
    step_seconds: Sequence[float] | None,
    slots: int,
    start: float,
) -> Cost:
    """Return what trials of these lengths take.

    Args:
        lengths: optimizer steps of each trial.
        tokens_per_step: of a trial.
        step_seconds: of a step of each trial; None: unknown.
        slots: trials at once.
        start: seconds before each trial's first step.
    """
    steps = sum(lengths)
    tokens = round(steps * tokens_per_step)
    if step_seconds is None:
        return Cost(steps, tokens, None, None)
    each = [start + n * s for n, s in zip(lengths, step_seconds, strict=True)]
    return Cost(steps, tokens, end_of(each, slots), sum(each))


def end_of(seconds: Sequence[float], slots: int) -> float:
    """Return when the last of some jobs ends that begin in order, `slots` at once."""
    free = [0.0] * max(1, slots)
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def shortest(lengths: Sequence[int], scheduler: str) -> list[int]:
    """Return the fewest steps that trials may take under a rule that ends those that fall behind.

    If the first trial is the best one, no other goes on behind the first rung.
    """
    if scheduler == "none":
        return list(lengths)
    return [n if place == 0 else min([*rungs_of(n), n]) for place, n in enumerate(lengths)]


def step_seconds(
    recipe: Recipe, model: Model, where: Machine, at_once: int, fill: float
) -> float | None:
    """Predict a step of one of `at_once` trials that run beside each other on a machine.

    None where the device's rates, or the model's shape, are not known.
    """
    if not model.is_known:
        return None
    counts = model.counts(recipe)
    if not where.gpus:
        return _cpu_seconds(recipe, counts, fill) * at_once
    if where.device is None:
        return None
    sharing = -(-at_once // where.gpus)
    laid = Layouts(recipe, counts, where).on(sharing).layout
    fixed, way = laid.applied(recipe, counts.layers), laid.way
    on_device, on_host = pace.sides(fixed, counts, where.device, fill, **way)
    power = pace.BALANCE
    micro: float = ((sharing * on_device) ** power + on_host**power) ** (1 / power)
    hosted: Any = way.get("hosted", ())
    update = pace.update_seconds(fixed, counts, where.device, hosted=hosted)
    return laid.accumulation * micro + sharing * update


def _cpu_seconds(recipe: Recipe, counts: Counts, fill: float) -> float:
    """Return the seconds of a step that has the whole machine."""
    packs, length = recipe.global_batch_size, recipe.data.max_length * fill
    again = recomputed_layers(recipe, counts.layers, on_gpu=False) / counts.layers
    passes = 3 if recipe.model.method == "full" else 2
    weights = counts.linear * (passes + again) + counts.vocabulary * counts.hidden * passes
    if recipe.model.method != "full":
        weights += 3 * counts.trained
    attention = 2 * length * counts.queries * counts.layers * (3.5 + again)
    operations = packs * length * (2 * weights + attention)
    return operations / (REACHED * products_rate(counts.hidden, counts.mlp))


@cache
def products_rate(hidden: int, mlp: int, rows: int = 512) -> float:
    """Measure float32 products of an MLP's shape; operations per second of all cores.

    By the time that cores worked, and the best of some tries, so that what else runs here now
    hardly counts.
    """
    random = np.random.default_rng(0)
    hidden, mlp = min(hidden, 1024), min(mlp, 4096)
    left = random.normal(size=(rows, hidden)).astype(np.float32)
    right = random.normal(size=(hidden, mlp)).astype(np.float32)
    left @ right
    rates = []
    for _ in range(TRIES):
        began, done = time.process_time(), 0
        while time.process_time() - began < TRY_SECONDS:
            left @ right
            done += 1
        rates.append(2 * rows * hidden * mlp * done / (time.process_time() - began))
    return max(rates) * (os.cpu_count() or 1)
