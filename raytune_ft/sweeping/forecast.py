"""Forecast: a sweep before it runs: trials at once, what they cost, when the last one ends.

The planner's numbers (`config.estimates`, `survey`), put together for many trials on one machine;
`tune --dry-run` prints them, the sweep takes its resources from them. No Ray; torch only where a
model's shape is on no card.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytune_ft import survey
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.outlook import spoken
from raytune_ft.sweeping import duration, population
from raytune_ft.sweeping.duration import Cost
from raytune_ft.sweeping.fit import Fit, Machine, Model, fit, heaviest, machine
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.words import short_field, short_value

if TYPE_CHECKING:
    from raytune_ft.row_counts import Counted
    from raytune_ft.sweeping.trials import Trial

CPUS = 0.5
"""Of a trial, as Ray counts them: less than a core, so that data tasks find room beside it."""
WIDTH = 80


@dataclass(frozen=True)
class Forecast:
    """What a sweep will take."""

    concurrent: int
    """Trials at once."""
    gpu_share: float
    """Of a GPU for each trial, as Ray counts them; 0 without GPUs."""
    cpus: float
    """For each trial, as Ray counts them."""
    seconds: float | None
    """Until the last trial ends, if none is stopped early; None where it cannot be told."""
    lines: list[str]
    """What the plan says of it."""
    most: Cost | None = None
    """If every trial runs to its end; None where steps are not known."""
    least: Cost | None = None
    """If all that may be stopped early are; equal to `most` where none may."""
    devices: int = 1
    """GPUs that trials run on; without GPUs the machine's cores."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        unit = "gpu_hours" if self.gpu_share else "core_hours"
        costs = {
            name: None if one is None else {**one.__dict__, unit: self.hours(one)}
            for name, one in (("least", self.least), ("most", self.most))
        }
        return {**self.__dict__, **costs}

    def hours(self, one: Cost) -> float | None:
        """Return the GPU-hours of a cost, or core-hours without GPUs."""
        return None if one.seconds is None else one.seconds * self.devices / 3600


def forecast(
    recipe: Recipe,
    n_trials: int,
    *,
    values: Sequence[Mapping[str, Any]] | None = None,
    steps: int | None = None,
    counted: Counted | None = None,
    cluster: Mapping[str, float] | None = None,
) -> Forecast:
    """Say how many of a sweep's trials run at once, what they cost and how long they take.

    Args:
        recipe: of the sweep.
        n_trials: of the sweep.
        values: of each trial; where they are not known yet the space's extremes are weighed.
        steps: of a trial, where the rows were counted before.
        counted: the rows, from which each trial's own steps follow.
        cluster: what Ray says it has (`ray.cluster_resources()`); it counts where RAY_ADDRESS
            names a cluster, else this machine does.

    Raises:
        MemoryPlanError: one trial does not fit, or not as many as `tune.concurrent` says.
        ModelError: the model's folder is none.
    """
    where = machine(cluster if os.environ.get("RAY_ADDRESS") else None)
    trials, weighed = [recipe] * n_trials, list(heaviest(recipe))
    if values and all(values):
        trials = [one for one in (_of(recipe, each) for each in values) if isinstance(one, Recipe)]
        weighed = trials or weighed
    found = fit(recipe, n_trials, weighed, where)
    lengths = _lengths(trials, steps, counted)
    most = least = None
    if lengths is not None:
        most, least = _costs(recipe, trials, lengths, counted, found, where)
    share = 1 / found.per_gpu if where.gpus else 0.0
    devices = min(where.gpus, found.concurrent) or where.cores
    seconds = None if most is None else most.seconds
    line = found.line if not recipe.tune.shared_base else _on_one_base(where)
    planned = Forecast(found.concurrent, share, CPUS, seconds, [line], most, least, devices)
    if lengths and recipe.tune.scheduler == "pbt":
        planned.lines.append(_population_line(recipe, len(lengths), max(lengths)))
    if most is not None and least is not None:
        planned.lines.extend(_cost_lines(recipe, planned, most, least))
    return planned


def _on_one_base(where: Machine) -> str:
    process = "in one process" if where.gpus < 2 else f"in a process for each of {where.gpus} GPUs"
    return f"trials that can share a base train on one, {process}; the others one by one"


def _of(recipe: Recipe, values: Mapping[str, Any]) -> Recipe | str:
    """Return a trial's recipe, or why its values cannot be together: it will fail alone."""
    try:
        return with_values(recipe, values)
    except RecipeError as error:
        return str(error)


def _lengths(
    trials: Sequence[Recipe], steps: int | None, counted: Counted | None
) -> list[int] | None:
    """Return the optimizer steps of each trial; None where they cannot be told."""
    if counted is not None and counted.packs is not None:
        found = []
        for one in trials:
            each = one.train.epochs * -(-counted.packs // one.global_batch_size)
            found.append(min(each, one.train.max_steps or each))
        return found
    known = [steps or one.train.max_steps for one in trials]
    return [one for one in known if one is not None] if all(known) else None


def _costs(
    recipe: Recipe,
    trials: Sequence[Recipe],
    lengths: Sequence[int],
    counted: Counted | None,
    found: Fit,
    where: Machine,
) -> tuple[Cost, Cost]:
    density = 1.0 if counted is None or counted.density is None else counted.density
    fill = density if recipe.data.packing == "none" else 1.0
    model = Model(recipe)
    each: list[duration.StepSeconds] = []
    for one in trials:
        seconds = duration.step_seconds(one, model, where, max(1, found.per_gpu), fill)
        if seconds is not None:
            each.append(seconds)
    known = each if len(each) == len(trials) else None
    start = duration.START_GPU if where.gpus else duration.START_CPU
    tokens = recipe.global_batch_size * recipe.data.max_length * density
    if recipe.tune.scheduler == "pbt":
        both = _in_parts(recipe, lengths, tokens, known, found.concurrent, start)
        return both, both
    few = duration.shortest(lengths, recipe.tune.scheduler)
    most = duration.cost(lengths, tokens, known, found.concurrent, start)
    return most, duration.cost(few, tokens, known, found.concurrent, start)


def _in_parts(
    recipe: Recipe,
    lengths: Sequence[int],
    tokens: float,
    known: Sequence[duration.StepSeconds] | None,
    slots: int,
    start: float,
) -> Cost:
    """Return what a population takes: all wait at each comparison, and begin again."""
    steps, tokens_of_all, seconds = 0, 0, 0.0 if known is not None else None
    stops = population.comparisons(recipe, max(lengths, default=0))
    for first, last in pairwise([0, *stops, max(lengths, default=0)]):
        part = duration.cost([last - first] * len(lengths), tokens, known, slots, start)
        steps, tokens_of_all = steps + part.steps, tokens_of_all + part.tokens
        seconds = None if seconds is None or part.seconds is None else seconds + part.seconds
    return Cost(steps, tokens_of_all, seconds)


def _population_line(recipe: Recipe, n_trials: int, steps: int) -> str:
    """Say when a population is compared, and how many trials go on with others' weights."""
    stops = population.comparisons(recipe, steps)
    if not stops:
        return (
            f"trials are never compared: {recipe.tune.metric} is measured too late, set eval.every "
            f"to {max(1, steps // population.PARTS)} or less"
        )
    count = max(1, n_trials // population.SHARE)
    return (
        f"compared about {len(stops)} times, behind steps {stops[0]:,} to {stops[-1]:,} of "
        f"{steps:,}: there {count} of {n_trials} go on with weights of the best {count}; each "
        f"trial begins {len(stops) + 1} times"
    )


def _cost_lines(recipe: Recipe, planned: Forecast, most: Cost, least: Cost) -> list[str]:
    """Say what a sweep costs, and when it ends if it begins now."""
    asha = recipe.tune.scheduler == "asha"
    steps = f"{most.steps:,} steps, {_large(most.tokens)} tokens"
    if asha:
        steps = f"at most {steps}; at least {least.steps:,} steps, if all but one stop early"
    hours = planned.hours(most)
    if most.seconds is None or hours is None:
        return [steps, "time: not predicted, since the rates of these devices are not known"]
    unit = "GPU-hours" if planned.gpu_share else "core-hours"
    end = datetime.now().astimezone() + timedelta(seconds=most.seconds)
    day = "" if end.date() == datetime.now().astimezone().date() else f"{end:%a %d %b} "
    about = (
        f"about {spoken(most.seconds)}, {hours:.2f} {unit}: begun now, it ends at {day}{end:%H:%M}"
    )
    if asha and least.seconds is not None:
        about += f", at the earliest in {spoken(least.seconds)}"
    return [steps, about]


def _large(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 10**6 else f"{count:,}"


def print_dry_run(recipe: Recipe, trials: Sequence[Trial], *, as_json: bool = False) -> int:
    """Print the trials, what they cost and when the last one would end; return 0.

    Args:
        recipe: of the sweep.
        trials: as they would run; their values are empty where a search chooses as it goes.
        as_json: plain values instead of tables.

    Raises:
        RecipeError, ModelError, DataError, MemoryPlanError: what the sweep would fail on.
    """
    found = survey.survey(recipe)
    tried = ((one.number, _of(recipe, one.values)) for one in trials)
    found.notes += [f"trial {n} cannot be: {why}" for n, why in tried if isinstance(why, str)]
    planned = forecast(
        recipe, len(trials), values=[one.values for one in trials], counted=found.counted
    )
    if as_json:
        said = [{"trial": one.number, "values": one.values} for one in trials]
        content = {"trials": said, "forecast": planned.to_json(), "notes": found.notes}
        print(json.dumps(content, ensure_ascii=False, indent=2))
        return 0
    wide = sys.stdout.isatty()
    console = Console(highlight=False, width=None if wide else WIDTH)
    console.print(trials_table(recipe, trials))
    if not any(one.values for one in trials):
        console.print("values are chosen as the sweep goes, by what trials before gave; from:")
        for name, choice in recipe.tune.space.items():
            console.print(Text(f"  {name}: {choice}"), soft_wrap=True)
    for line in planned.lines:
        console.print(Text.assemble(("plan    ", "bold"), line), soft_wrap=True)
    for note in found.notes:
        console.print(Text.assemble(("note    ", "bold"), note), soft_wrap=True)
    return 0


def trials_table(recipe: Recipe, trials: Sequence[Trial]) -> Table:
    """Lay trials and their values out; a field that follows another says what it is tied to."""
    fields = list(dict.fromkeys(name for one in trials for name in one.values))
    table = Table(title=f"{len(trials)} trials", title_justify="left")
    table.add_column("trial", justify="right")
    for name in fields:
        tie = recipe.tune.space.get(name)
        title = short_field(name, fields) + (f"\n= {tie}" if isinstance(tie, str) else "")
        table.add_column(Text(title), justify="right", overflow="fold")
    for one in trials:
        cells = (Text(short_value(one.values.get(name))) for name in fields)
        table.add_row(str(one.number), *cells)
    return table
