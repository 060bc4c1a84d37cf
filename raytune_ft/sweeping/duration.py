"""Duration: trials, where they run and how many at once in, when the last one ends out.

On a GPU a step is `pace`'s, slowed down by those that share it; on a CPU it is the floating-point
operations of its products over a rate that is measured here in a moment. Trials begin in their
order, each where one ended first. No torch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from raytune_ft import host
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


StepSeconds = Callable[[int], float]
"""Seconds of a trial's step while so many trials run at once."""


@dataclass(frozen=True)
class Cost:
    """What trials take."""

    steps: int
    tokens: int
    """In packs, padding left out."""
    seconds: float | None
    """Until the last one ends; None where no rate is known."""


def cost(
    lengths: Sequence[int],
    tokens_per_step: float,
    each: Sequence[StepSeconds] | None,
    slots: int,
    start: float,
) -> Cost:
    """Return what trials of these lengths take.

    Args:
        lengths: optimizer steps of each trial.
        tokens_per_step: of a trial.
        each: a step's seconds, trial by trial; None: unknown.
        slots: trials at once.
        start: seconds before each trial's first step.
    """
    steps = sum(lengths)
    seconds = None if each is None else end_of(lengths, each, slots, start)
    return Cost(steps, round(steps * tokens_per_step), seconds)


def end_of(lengths: Sequence[int], each: Sequence[StepSeconds], slots: int, start: float) -> float:
    """Return when the last of some trials ends that begin in order, `slots` at once.

    From one end of a trial to the next one all that run go on at the pace of so many.
    """
    waiting, now = deque(range(len(lengths))), 0.0
    running: dict[int, tuple[float, float]] = {}  # seconds until the first step, steps left
    while waiting or running:
        while waiting and len(running) < max(1, slots):
            trial = waiting.popleft()
            running[trial] = (start, float(lengths[trial]))
        pace_of = {trial: each[trial](len(running)) for trial in running}
        left = {t: begin + steps * pace_of[t] for t, (begin, steps) in running.items()}
        passed = min(left.values())
        now += passed
        for trial, (begin, steps) in list(running.items()):
            if left[trial] <= passed * (1 + 1e-12):
                del running[trial]
                continue
            stepped = max(0.0, passed - begin)
            running[trial] = (max(0.0, begin - passed), steps - stepped / pace_of[trial])
    return now


def shortest(lengths: Sequence[int], scheduler: str) -> list[int]:
    """Return the fewest steps that trials may take under a rule that ends those that fall behind.

    If the first trial is the best one, no other goes on behind the first rung.
    """
    if scheduler != "asha":
        return list(lengths)
    return [n if place == 0 else min([*rungs_of(n), n]) for place, n in enumerate(lengths)]


def step_seconds(
    recipe: Recipe, model: Model, where: Machine, per_gpu: int, fill: float
) -> StepSeconds | None:
    """Predict a trial's step, as slow as the number of trials beside it makes it.

    None where the device's rates, or the model's shape, are not known.

    Args:
        recipe: of the trial.
        model: of the sweep.
        where: it runs.
        per_gpu: trials for which a GPU's memory is parted.
        fill: tokens over the room in the packs, where packs are as short as their rows.
    """
    if not model.is_known:
        return None
    counts, device = model.counts(recipe), where.device
    if not where.gpus:
        alone = _cpu_seconds(recipe, counts, fill)
        return lambda at_once: alone * at_once
    if device is None:
        return None
    laid = Layouts(recipe, counts, where).on(per_gpu).layout
    fixed, way = laid.applied(recipe, counts.layers), laid.way
    sides = pace.sides(fixed, counts, device, fill, **way)
    update = pace.update_seconds(fixed, counts, device, hosted=laid.hosted)

    def shared(at_once: int) -> float:
        sharing = -(-at_once // where.gpus)
        return laid.accumulation * sides.joined(sharing) + sharing * update

    return shared


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
    return max(rates) * host.cores()
