"""Layout: a recipe, a model's counts and free memory in, how a step runs there out. No torch.

An optimizer step's packs may go through a forward pass one by one or many at a time, the first
decoder layers may run again in the backward pass, and a quantised base may lie unpacked beside its
codes, and embedding, head and the inputs of recomputed layers may wait on the host: the loss is
summed over labelled tokens, so each layout is the same mathematics, and only speed and memory
differ. `train.layout: auto` takes the one that `pace` says is the fastest of those
that `peak` says fit. The first layers recompute, not the last: what the others keep is gone again
by the time the backward pass reaches them, so no layer is made again while all else is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.pace import Device, micro_seconds, update_seconds
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.estimates.setting import INPUTS, LADDER, Setting, recomputed_layers, zero_of
from raytune_ft.config.schema import Recipe

GIB = 2**30
FILLED = 0.92
"""Share of the free memory that is planned for: torch's blocks leave gaps, and an automatic choice
must not be the one that ends a run."""
AS_FAST = 1.01
"""Times the seconds of the fastest: of such layouts, the one with the least memory is taken."""
TABLES = ("embed_tokens", "lm_head", "embed_out", "wte")
"""What networks call embedding and head."""
STEP_DOWN = 0.9
"""Of the memory of a layout that did not fit: the next one that is tried takes at most so much."""


@dataclass(frozen=True)
class Layout:
    """How one worker takes an optimizer step."""

    micro_batch_size: int
    accumulation: int
    recomputed: int
    """Decoder layers, the first ones, that run again in the backward pass."""
    resident: bool = False
    """Whether a quantised base is unpacked once, not at each use."""
    hosted: tuple[str, ...] = ()
    """What lies on the host, by the names of `setting.LADDER`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosted", tuple(self.hosted))  # JSON has lists

    @property
    def way(self) -> dict[str, Any]:
        """What estimates need to know that is no value of a recipe."""
        return {"resident": self.resident, "hosted": self.hosted}

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `Layout(**values)` reads them, and those of earlier versions."""
        values = asdict(self)
        hosted = list(values.pop("hosted"))
        return {**values, "hosted": hosted} if hosted else values

    def applied(self, recipe: Recipe, layers: int) -> Recipe:
        """Return the recipe with this layout's values, which are its own from now on.

        Args:
            recipe: whose step it is; its values are not checked anew.
            layers: decoder layers of the model.
        """
        again = self.recomputed
        train = {
            "layout": "recipe",
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
        }
        model = {"gradient_checkpointing": again if 0 < again < layers else again > 0}
        return recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update=model),
                "train": recipe.train.model_copy(update=train),
            }
        )

    def said(self, layers: int) -> str:
        """Describe it in words: `4 packs per pass x 4 passes, no layer recomputed`."""
        packs = "1 pack" if self.micro_batch_size == 1 else f"{self.micro_batch_size} packs"
        passes = "1 pass" if self.accumulation == 1 else f"{self.accumulation} passes"
        unpacked = ", weights unpacked once" if self.resident else ""
        again = f"{_recomputed(self.recomputed, layers)}{unpacked}"
        away = f", {_listed(self.hosted)} on the host" if self.hosted else ""
        return f"{packs} per pass x {passes}, {again}{away}"


@dataclass(frozen=True)
class Weighed:
    """A layout with what it takes."""

    layout: Layout
    memory: int
    """Peak of one worker, in bytes."""
    seconds: float
    """Of an optimizer step."""


@dataclass(frozen=True)
class Choice:
    """The layout of a run, and why it is that one; `run.json` keeps it."""

    layout: Layout
    layers: int
    """Decoder layers of the model."""
    memory: int
    """Peak of one worker by the plan, in bytes."""
    seconds: float
    """Of an optimizer step, by the plan."""
    available: int
    """Bytes that were free, of which `FILLED` may be planned for."""
    why: str
    """One sentence."""
    smaller: tuple[Layout, ...]
    """What takes less memory, the fastest first: tried one after the other where memory ends."""
    asked: dict[str, Any]
    """What the recipe said: another wish is another choice."""

    @property
    def line(self) -> str:
        """The layout and its reason, as a run says them."""
        return f"{self.layout.said(self.layers)}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        layouts = {
            "layout": self.layout.to_json(),
            "smaller": [one.to_json() for one in self.smaller],
        }
        return {**asdict(self), **layouts}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Choice:
        """Read what `to_json` gave."""
        layouts = {
            "layout": Layout(**content["layout"]),
            "smaller": tuple(Layout(**one) for one in content["smaller"]),
        }
        return cls(**{**content, **layouts})


def asked(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe that a choice was made for."""
    train = recipe.train
    return {
        "layout": train.layout,
        "micro_batch_size": train.micro_batch_size,
        "accumulation": train.accumulation,
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "deepspeed": train.deepspeed,
        "workers": recipe.run.workers,
    }


def choose(recipe: Recipe, counts: Counts, available: int, device: Device) -> Choice:
    """Return the fastest layout that fits; the smallest of all where none does.

    Args:
        recipe: as it was asked for; the packs of its step stay.
        counts: of its model.
        available: free bytes of the GPU that has the least.
        device: whose rates decide what is fast.
    """
    found = weighed(recipe, counts, device)
    best = fastest(found, available * FILLED) or smallest(found)
    own = recipe.model_copy(update={"train": recipe.train.model_copy(update={"layout": "recipe"})})
    before = weigh(own, counts, device, own_layout(recipe, counts.layers))
    return Choice(
        best.layout,
        counts.layers,
        best.memory,
        best.seconds,
        available,
        _compute(recipe)
        + _why(best, before, available, counts.layers)
        + _cost(recipe, counts, device, best),
        tuple(one.layout for one in _downwards(found, best.memory)),
        asked(recipe),
    )


def own_layout(recipe: Recipe, layers: int) -> Layout:
    """Return what `train.layout: recipe` runs on a GPU."""
    train = recipe.train
    again = recomputed_layers(recipe, layers, on_gpu=True)
    return Layout(train.micro_batch_size, train.accumulation, again)


def weighed(recipe: Recipe, counts: Counts, device: Device) -> list[Weighed]:
    """Return every layout of a recipe's step with what it takes."""
    every = chain(layouts(recipe, counts), hosted_layouts(recipe, counts))
    return [weigh(recipe, counts, device, one) for one in every]


def hosted_layouts(recipe: Recipe, counts: Counts) -> Iterator[Layout]:
    """Yield the layouts that keep something on the host as well."""
    if not _can_host(recipe, counts):
        return
    for one in layouts(recipe, counts):
        for hosted in () if one.resident else LADDER:  # what is unpacked takes far more than these
            if INPUTS not in hosted or one.recomputed > 1:
                yield replace(one, hosted=hosted)


def _can_host(recipe: Recipe, counts: Counts) -> bool:
    """Tell whether embedding and head are frozen tables of one worker, beside fast layers."""
    setting, targets = Setting(recipe, counts, on_gpu=True), recipe.lora.targets
    if not setting.has_fast_linears or recipe.run.workers > 1 or recipe.train.objective != "sft":
        return False
    frozen = not (recipe.lora.modules_to_save or recipe.model.new_tokens)
    return frozen and (targets == "all-linear" or not set(targets) & set(TABLES))


def layouts(recipe: Recipe, counts: Counts) -> Iterator[Layout]:
    """Yield every layout with the packs of the recipe's step, all of it on the device."""
    train = recipe.train
    packs = train.micro_batch_size * train.accumulation
    micros = [n for n in range(1, packs + 1) if packs % n == 0]
    if zero_of(train.deepspeed).sizes_batches:
        micros = [train.micro_batch_size]
    # only the fast path's layers can do without the packed weights
    setting = Setting(recipe, counts, on_gpu=True)
    other = recipe.model.quantization == "nf4" or setting.in_float8
    can_stay = other and setting.has_fast_linears
    for micro in micros:
        for again in range(counts.layers + 1):
            for resident in (False, True) if can_stay else (False,):
                yield Layout(micro, packs // micro, again, resident)


def fastest(found: Iterable[Weighed], limit: float) -> Weighed | None:
    """Return the fastest that takes at most `limit` bytes; None if none does.

    Of those that are as fast within 1%, it is the one with the least memory.
    """
    fitting = [one for one in found if one.memory <= limit]
    if not fitting:
        return None
    best = min(one.seconds for one in fitting)
    as_fast = (one for one in fitting if one.seconds <= best * AS_FAST)
    return min(as_fast, key=lambda one: (one.memory, one.seconds))


def smallest(found: Iterable[Weighed]) -> Weighed:
    """Return the one that takes the least memory; the fastest of equals."""
    return min(found, key=lambda one: (one.memory, one.seconds))


def weigh(recipe: Recipe, counts: Counts, device: Device, layout: Layout) -> Weighed:
    """Return a layout of a recipe's step with what it takes."""
    fixed = layout.applied(recipe, counts.layers)
    parts = memory_bytes(fixed, counts, on_gpu=True, **layout.way)
    micro = micro_seconds(fixed, counts, device, **layout.way)
    update = update_seconds(fixed, counts, device, hosted=layout.hosted)
    return Weighed(layout, sum(parts.values()), layout.accumulation * micro + update)


def _downwards(found: list[Weighed], memory: int) -> Iterator[Weighed]:
    """Yield the fastest with clearly less memory, again and again, the smallest of all last."""
    last, least = memory, smallest(found)
    while (smaller := fastest(found, last * STEP_DOWN)) is not None:
        yield smaller
        last = smaller.memory
    if least.memory < last:
        yield least


def _compute(recipe: Recipe) -> str:
    return "products in float8, " if recipe.model.compute == "fp8" else ""


def _cost(recipe: Recipe, counts: Counts, device: Device, best: Weighed) -> str:
    """Say what it costs to have things on the host."""
    if not best.layout.hosted:
        return ""
    here = weigh(recipe, counts, device, replace(best.layout, hosted=()))
    freed = f"frees {(here.memory - best.memory) / GIB:.1f} GiB"
    return f"; what is on the host {freed} and costs {best.seconds / here.seconds - 1:.1%} of time"


def _why(best: Weighed, own: Weighed, available: int, layers: int) -> str:
    taken = f"about {best.memory / GIB:.1f} of {available / GIB:.1f} GiB"
    if best.memory > available * FILLED:
        return f"{taken}, the least that any layout takes"
    text = f"{taken}, the fastest that fits"
    if own.layout == best.layout:
        return f"{text}, as the recipe says"
    said = f"{own.layout.micro_batch_size} x {own.layout.accumulation}"
    again = _recomputed(own.layout.recomputed, layers)
    if own.memory > available:
        return f"{text}; the recipe's {said}, {again}, needs {own.memory / GIB:.1f} GiB"
    return f"{text}; the recipe's {said}, {again}, takes {own.seconds / best.seconds:.1f} x as long"


def _listed(names: tuple[str, ...]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _recomputed(again: int, layers: int) -> str:
    if again == 0:
        return "no layer recomputed"
    if again == layers:
        return "all layers recomputed"
    first = "the first" if again == 1 else f"the first {again}"
    return f"{first} of {layers} layers recomputed"
