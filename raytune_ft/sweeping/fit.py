"""Fit: a recipe's heaviest trial and the memory there is in, how many trials run at once out.

On GPUs a trial is weighed with its CUDA context, against its share of what is free; on a CPU as a
process of the host, which has a core at least. Parameters are counted from the model's shape as a
card has it, or else on its network, which takes torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_ft import host, survey
from raytune_ft.config import catalog
from raytune_ft.config.estimates import footprint, gpus, layout, pace, peak
from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.layout import Weighed
from raytune_ft.config.estimates.pace import DEVICES, Device
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError
from raytune_ft.sweeping.space import with_values

GIB = 2**30
FILLED = 0.8
"""Share of the host's memory that trials may take: Ray's store and the data tasks have the rest."""
SLOWER = 1.1
"""Times as long as alone that a step may take in the layout of a share of a GPU."""
CLEARLY = 1.05
"""Times the memory there is, above which a prediction is a refusal."""


@dataclass(frozen=True)
class Machine:
    """What trials run on."""

    cores: int
    memory: int | None
    """Bytes of the host; None: unknown."""
    gpus: int = 0
    free: int | None = None
    """Bytes of each GPU that no process holds; None: unknown."""
    device: Device | None = None
    """None where its rates are not known."""


@dataclass(frozen=True)
class Fit:
    """How many trials run at once."""

    concurrent: int
    per_gpu: int
    """0 without GPUs."""
    needed: int | None
    """Bytes of the heaviest trial; None where the model's shape is not known."""
    line: str


def machine(cluster: Mapping[str, float] | None = None) -> Machine:
    """Describe this machine, or the cluster that a driver joined.

    Args:
        cluster: what Ray says the cluster has (`ray.cluster_resources()`); None: this machine. Of
            a cluster's GPUs no more is known than what their names tell.
    """
    if cluster is not None:
        count = int(cluster.get("GPU", 0))
        names = [key.partition(":")[2] for key in cluster if key.startswith("accelerator_type:")]
        known = [found for found in map(pace.device_called, names) if found is not None]
        smallest = min(known, key=lambda one: one.memory) if known and count else None
        free = None if smallest is None else smallest.memory
        memory = int(cluster["memory"]) if "memory" in cluster else None
        return Machine(max(1, int(cluster.get("CPU", 1))), memory, count, free, smallest)
    found, cores = gpus.visible(), host.cores()
    if not found:
        return Machine(cores, host.memory())
    free = min(one.memory if one.free is None else one.free for one in found)
    device = pace.device_called(min(found, key=lambda one: one.memory).name)
    return Machine(cores, host.memory(), len(found), free, device)


def fit(recipe: Recipe, n_trials: int, trials: Iterable[Recipe], where: Machine) -> Fit:
    """Return how many of `n_trials` run at once; `tune.concurrent` caps it.

    Args:
        recipe: of the sweep.
        n_trials: of the sweep.
        trials: recipes of which the heaviest decides.
        where: they run.

    Raises:
        MemoryPlanError: one trial does not fit, or not as many as `tune.concurrent` says.
    """
    model = Model(recipe)
    asked = recipe.tune.concurrent
    if where.gpus:
        most, needed = _on_gpu(trials, model, where)
        there = where.free
    else:
        sizes = [_on_cpu(one, model) for one in trials] if model.is_known else []
        needed, there = max(sizes, default=None), where.memory
        most = where.cores
        if needed is not None and there is not None:
            _refuse_one(needed, there, "this machine")
            most = max(1, min(most, int(there * FILLED // needed)))
    if asked is not None and asked > most and min(asked, n_trials) > most:
        raise MemoryPlanError(_too_many(asked, most, needed, there, where))
    chosen = max(1, min(most, n_trials, asked or most))
    per_gpu = -(-chosen // where.gpus) if where.gpus else 0
    return Fit(chosen, per_gpu, needed, _line(chosen, needed, where))


class Model:
    """The counts of a sweep's model for each recipe of it."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.model.path
        self._counts: dict[str, Counts] = {}

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The model's config.json, or its card's shape; None where neither is here."""
        folder = survey.model_folder(self.path)
        return survey.read_config(folder) if folder else catalog.card_config(self.path)

    @property
    def is_known(self) -> bool:
        """Whether its shape is."""
        return self.config is not None

    @cached_property
    def _shape(self) -> Any:
        from raytune_ft.model.memory import Shape  # torch takes seconds to import

        return Shape(self.config or {})

    def counts(self, recipe: Recipe) -> Counts:
        """Count parameters; the model must be known."""
        key = f"{recipe.lora} {recipe.model}"
        if key not in self._counts:
            card = catalog.card_config(self.path)
            content = self.config or {}
            is_card = card is not None and all(content.get(k) == v for k, v in card.items())
            by_card = card is not None and is_card and not _needs_network(recipe)
            self._counts[key] = (
                footprint.count(card, recipe)
                if by_card and card is not None
                else self._shape.counts(recipe)
            )
        return self._counts[key]


def _needs_network(recipe: Recipe) -> bool:
    """Tell whether a recipe trains what `footprint.count` does not look at."""
    return bool(recipe.lora.modules_to_save or recipe.model.new_tokens)


def heaviest(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipe with each value of its space that may take the most, one field at a time.

    The last one has the largest number of every field at once. Ties and words are left alone.
    """
    yield recipe
    largest: dict[str, Any] = {}
    for name, choice in recipe.tune.space.items():
        if isinstance(choice, str):
            continue
        values = [choice["low"], choice["high"]] if isinstance(choice, dict) else choice
        for value in values:
            yield with_values(recipe, {name: value}, alone=True)
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if numbers:
            largest[name] = max(numbers)
    yield with_values(recipe, largest, alone=True)


class Layouts:
    """How a trial can be laid out on a GPU, weighed once for all shares of it."""

    def __init__(self, recipe: Recipe, counts: Counts, where: Machine) -> None:
        device = where.device or DEVICES["h200"]
        self.recipe, self.counts = recipe, counts
        self.free = where.free or device.memory
        if recipe.train.layout == "auto":
            self.weighed = layout.weighed(recipe, counts, device)
        else:
            own = layout.own_layout(recipe, counts.layers)
            self.weighed = [layout.weigh(recipe, counts, device, own)]

    def on(self, share: int) -> Weighed:
        """Return the layout of a trial that has one of `share` parts of the GPU."""
        room = self.free / share * layout.FILLED
        return layout.fastest(self.weighed, room) or layout.smallest(self.weighed)

    def host_bytes(self, share: int) -> int:
        """Return what such a trial takes of the host: its process, and what is kept there."""
        laid = self.on(share).layout
        fixed = laid.applied(self.recipe, self.counts.layers)
        return peak.PROCESS + sum(peak.host_bytes(fixed, self.counts, laid.hosted).values())

    def most(self, limit: int) -> int:
        """Return how many such trials fit on the GPU, up to `limit`, without getting slow."""
        alone, fitting = self.on(1), 1
        for share in range(2, limit + 1):
            one = self.on(share)
            room = one.memory * share <= self.free * layout.FILLED
            if not room or one.seconds > SLOWER * alone.seconds:
                break
            fitting = share
        return fitting


def _on_gpu(trials: Iterable[Recipe], model: Model, where: Machine) -> tuple[int, int | None]:
    """Return how many trials fit on the GPUs and beside each other on the host; bytes on a GPU."""
    if not model.is_known or where.free is None:
        return min(where.gpus, where.cores), None
    each = list(_different(trials, model, where))
    for one in each:
        _refuse_one(one.on(1).memory, where.free, "each GPU")
    per_gpu = where.cores
    for one in each:
        per_gpu = min(per_gpu, one.most(per_gpu))
    most = min(per_gpu * where.gpus, where.cores)
    if where.memory is not None:
        host = max(one.host_bytes(per_gpu) for one in each)
        most = max(1, min(most, int(where.memory * FILLED // host)))
    return most, max(one.on(per_gpu).memory for one in each)


def _different(trials: Iterable[Recipe], model: Model, where: Machine) -> Iterator[Layouts]:
    """Yield the layouts of trials that differ in what they take."""
    seen = set()
    device = where.device or DEVICES["h200"]
    for recipe in trials:
        counts = model.counts(recipe)
        own = layout.weigh(recipe, counts, device, layout.own_layout(recipe, counts.layers))
        key = (counts, own, recipe.train.layout)
        if key not in seen:
            seen.add(key)
            yield Layouts(recipe, counts, where)


def _on_cpu(recipe: Recipe, model: Model) -> int:
    return sum(peak.memory_bytes(recipe, model.counts(recipe), on_gpu=False).values())


def _refuse_one(needed: int, there: int, what: str) -> None:
    if needed > CLEARLY * there:
        raise MemoryPlanError(
            f"tune: one trial needs about {needed / GIB:.1f} GiB, {what} has {there / GIB:.1f} "
            "GiB; raytune-ft plan shows the settings that fit"
        )


def _too_many(asked: int, most: int, needed: int | None, there: int | None, where: Machine) -> str:
    if needed is None or there is None:
        what = f"{where.gpus} GPUs" if where.gpus else f"{where.cores} cores"
        return f"tune.concurrent: {asked} trials at once on {what}; set it to {most} or fewer"
    what = "each GPU" if where.gpus else f"this machine ({where.cores} cores)"
    return (
        f"tune.concurrent: {asked} trials at once need about {needed / GIB:.1f} GiB each; {what} "
        f"has {there / GIB:.1f} GiB; set it to {most} or fewer"
    )


def _line(chosen: int, needed: int | None, where: Machine) -> str:
    trials = "1 trial at a time" if chosen == 1 else f"{chosen} trials at once"
    cores = f"{where.cores} cores" if where.cores > 1 else "1 core"
    if needed is None:
        there = f"{where.gpus} GPUs" if where.gpus else cores
        return f"{trials} on {there}; the model's shape or the memory is not known here"
    taken = f"each takes at most {needed / GIB:.1f} GiB"
    if where.gpus and where.free is not None:
        gpu = "the GPU" if where.gpus == 1 else f"each of {where.gpus} GPUs"
        context = " with its CUDA context"
        return f"{trials}: {taken}{context}; {gpu} has {where.free / GIB:.1f} GiB free"
    memory = "" if where.memory is None else f"{where.memory / GIB:.1f} GiB and "
    return f"{trials}: {taken} and a core; this machine has {memory}{cores}"
