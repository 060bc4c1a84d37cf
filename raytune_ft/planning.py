"""`plan`: what a recipe needs and does, predicted before it starts. No Ray, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from raytune_ft import outlook, survey
from raytune_ft.config.estimates import pace
from raytune_ft.config.estimates.links import Shares, shares
from raytune_ft.config.schema import Recipe
from raytune_ft.data.report import CUT, SPLIT, Report
from raytune_ft.errors import MemoryPlanError
from raytune_ft.outlook import GIB, Pace, spoken
from raytune_ft.row_counts import Counted

if TYPE_CHECKING:
    from raytune_ft.model.memory import MemoryPlan

PACKINGS = {
    "best_fit": "by best fit, rows apart",
    "concat": "end to end and cut, rows apart",
    "none": "a row each",
    "compat": "as XTuner packs",
}
"""What `inspect` and `plan` say of a way of packing."""


@dataclass(frozen=True)
class PlanReport:
    """What is known of a run before it starts; None is what cannot be known here and now."""

    memory: MemoryPlan | None
    rows: Report | None
    """Of all rows; estimated from `rows_read` of them unless `exact`, as packs and steps are."""
    rows_read: int
    exact: bool
    packs: int | None
    """Packs of the first epoch."""
    density: float | None
    """Tokens over the room in the packs, 0 to 1."""
    steps: int | None
    """Optimizer steps of the whole run."""
    notes: list[str]
    pace: Pace | None = None
    """None where the device's rates are not known."""
    network: Shares | None = None
    """What networks leave of several workers' speed; None for one, and without `pace`."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        memory = None if self.memory is None else memory_json(self.memory)
        pace = None if self.pace is None else self.pace.__dict__
        network = None if self.network is None else self.network.__dict__
        return {**self.__dict__, "memory": memory, "pace": pace, "network": network}


def plan_recipe(
    recipe: Recipe, gpu_memory: str | None = None, gpu: str | None = None
) -> PlanReport:
    """Predict what a recipe needs and does.

    Args:
        recipe: checked by the loader.
        gpu_memory: what there is per GPU, such as `8GiB`; None: as much as `gpu` has.
        gpu: a GPU's name, such as `h200`; None: this machine's, if it has one.

    Raises:
        RecipeError, ModelError, DataError: what training would fail on.
    """
    where = outlook.place(gpu_memory, gpu, may_measure=True)
    outlook.check_float8(recipe, where.device)
    found = survey.survey(recipe)
    rows, notes = found.counted, list(found.notes)
    packs = rows.packs if rows else None
    memory = survey.memory_of(found, where.memory, where.device, packs, where.free)
    if memory is None:
        notes.append("memory: not predicted, since the model's config.json is not here")
    elif where.memory is None:
        notes.append("memory: on this machine's CPU; predict for a GPU with --gpu-memory 8GiB")
    elif where.device is None:
        notes.append("time: not predicted; name the GPU with --gpu " + ", ".join(pace.DEVICES))
    speed = None
    if memory is not None:
        speed = outlook.pace_of(memory.recipe, memory.counts, where, rows, memory.choice)
    network = None
    if memory is not None and speed is not None:
        work = memory.recipe.train.accumulation * speed.micro_s + speed.update_s
        network = shares(memory.recipe, memory.counts, work)
    if rows is None:
        return PlanReport(memory, None, 0, False, None, None, None, notes, speed, network)
    return PlanReport(
        memory, rows.report, rows.read, rows.exact, packs, rows.density, rows.steps, notes, speed,
        network,
    )  # fmt: skip


def print_plan(
    recipe: Recipe,
    gpu_memory: str | None = None,
    gpu: str | None = None,
    *,
    source: str = "CONFIG",
    as_json: bool = False,
) -> int:
    """Print the plan and return 0; MemoryPlanError after it if it does not fit.

    Args:
        recipe: as `plan_recipe`'s, like the next two.
        gpu_memory: see there.
        gpu: see there.
        source: what the user called the recipe; the proposed command names it.
        as_json: plain values instead of a table.
    """
    report = plan_recipe(recipe, gpu_memory, gpu)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        print_pairs([*_plan_rows(recipe, report), *(("note", note) for note in report.notes)])
        if report.memory is not None and report.memory.proposals:
            print_pairs(proposal_rows(report.memory, source, exact=report.packs is not None))
    if report.memory is not None and report.memory.fits is False:
        raise MemoryPlanError(shortage(report.memory))
    return 0


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns, each pair on one line."""
    console, lines = Console(highlight=False, soft_wrap=True), list(pairs)
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        console.print(Text.assemble((name.ljust(width + 2), "bold"), value))


def _plan_rows(recipe: Recipe, report: PlanReport) -> Iterator[tuple[str, str]]:
    model, train = recipe.model, recipe.train
    weights = "" if model.quantization == "none" else f" on {model.quantization}"
    yield "model", f"{model.path}, {model.method}{weights}, template {model.template}"
    yield "data", ", ".join(source.path for source in recipe.data.sources)
    if report.rows is not None:
        counted = Counted(
            report.rows, report.rows_read, report.exact, report.packs, report.steps, report.density
        )
        yield from count_rows(counted, recipe)
    laid = report.memory.recipe.train if report.memory is not None else train
    yield (
        "batch",
        (
            f"{recipe.global_batch_size} packs per step = {laid.micro_batch_size} per pass"
            f" x {laid.accumulation} passes x {recipe.run.workers} workers"
        ),
    )
    if report.memory is not None and report.memory.choice is not None:
        yield "layout", report.memory.choice.line
    if report.steps is None:
        yield "steps", f"{train.epochs} epochs; steps are known when model and rows are here"
    else:
        about = "" if report.exact and train.epochs == 1 else "~"
        yield "steps", f"{about}{report.steps:,} in {train.epochs} epochs"
    if report.pace is not None:
        yield from pace_rows(report.pace)
    if report.network is not None:
        yield "network", report.network.line(recipe.run.workers)
    if report.memory is not None:
        yield from memory_rows(report.memory)


def pace_rows(speed: Pace) -> Iterator[tuple[str, str]]:
    """Yield what was predicted of time."""
    rates = "" if speed.is_measured else ", by its data sheet"
    text = f"~{speed.tokens_per_s:,.0f} tokens/s per worker on {speed.device}{rates}"
    if speed.epoch_s is not None:
        text += f", ~{spoken(speed.epoch_s)} per epoch"
    yield "time", text


def proposal_rows(memory: MemoryPlan, source: str, *, exact: bool) -> Iterator[tuple[str, str]]:
    """Yield the command with the fastest settings that fit, and what else does.

    Args:
        memory: with proposals.
        source: what the user called the recipe.
        exact: whether the packs of an epoch are known; a stand-in was weighed otherwise.
    """
    best = memory.proposals[0]
    yield "", ""
    if best.overrides:
        yield "fastest that fits", f"raytune-ft train {source} {best.line}"
    else:
        yield "fastest that fits", "the recipe as it is"
    for one in memory.proposals:
        slower = one.seconds / best.seconds
        time = spoken(one.seconds) if exact else f"{slower:.2f} x its time"
        yield (
            f"  {one.memory / GIB:.1f} GiB",
            f"{time:>12}  {one.line or 'as it is'}; {one.layout.said(one.layers)}",
        )


def memory_rows(memory: MemoryPlan) -> Iterator[tuple[str, str]]:
    """Yield a row per part of the predicted peak."""
    yield "memory", f"{memory.total / GIB:.2f} GiB at the peak, per worker"
    for name, size in memory.parts.items():
        yield f"  {name}", f"{size / GIB:.2f} GiB"
    for name, size in memory.host.items():
        yield f"  host: {name}", f"{size / GIB:.2f} GiB"
    if memory.least is not None and memory.choice is not None:
        layers, slower = memory.choice.layers, memory.least.seconds / memory.choice.seconds
        least = f"{memory.least.memory / GIB:.2f} GiB: {memory.least.layout.said(layers)}"
        yield "  least of all layouts", f"{least}; {slower:.2f} x the time"


def memory_json(memory: MemoryPlan) -> dict[str, Any]:
    """Return a memory plan as plain values, sizes in bytes."""
    return {
        "total": memory.total,
        "parts": dict(memory.parts),
        "host": dict(memory.host),
        "fits": memory.fits,
        "layout": None if memory.choice is None else memory.choice.to_json(),
        "proposals": [
            {
                "overrides": list(one.overrides),
                "layout": one.layout.to_json(),
                "memory": one.memory,
                "seconds": one.seconds,
            }
            for one in memory.proposals
        ],
    }


def shortage(memory: MemoryPlan) -> str:
    """Say by how much a run does not fit, and which settings would."""
    found = memory.proposals
    advice = f"set {found[0].line}" if found else "no setting of this recipe makes it fit"
    return f"needs about {memory.total / GIB:.1f} GiB, more than there is: {advice}"


def count_rows(counted: Counted, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield a line per figure: rows used, dropped, cut and split with places, tokens, packs.

    `~` marks what is an estimate.
    """
    report, about = counted.report, "" if counted.exact else "~"
    dropped = sum(report["dropped"].values())
    yield (
        "rows",
        f"{about}{report['used']:,} used of {report['rows']:,}, {about}{dropped:,} dropped",
    )
    for reason, count in report["dropped"].items():
        yield f"  {reason}", f"{about}{count:,}: {_places(report, reason, count)}"
    limit = recipe.data.max_length
    if report["cut"]:
        places = _places(report, CUT, report["cut"])
        yield "  cut at max_length", f"{about}{report['cut']:,}: {places}"
    if report["split"]:
        places = _places(report, SPLIT, report["split"])
        yield "  split at max_length", f"{about}{report['split']:,}: {places}"
    if report["tokens"]:
        share = report["targets"] / report["tokens"]
        yield "tokens", f"{about}{report['tokens']:,} per epoch, {share:.0%} of them trained"
    if counted.packs is not None and counted.density is not None:
        yield (
            "packs",
            f"{about}{counted.packs:,} per epoch of {limit} tokens, {counted.density:.0%} full, "
            f"{PACKINGS[recipe.data.packing if recipe.data.compat is None else 'compat']}",
        )


def _places(report: Report, reason: str, count: int) -> str:
    places = report["places"].get(reason, [])[:3]
    return ", ".join(places) + (" ..." if count > len(places) else "")
