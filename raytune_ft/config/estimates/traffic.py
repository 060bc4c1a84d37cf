"""Traffic: a recipe and its model's counts in, bytes that ranks exchange in a step out. No torch.

A payload is the whole tensor of a collective: what is summed, or what every rank holds behind a
gathering. `sent` turns it into the bytes that one rank sends in a ring; `links` makes seconds of
it. tests/training/test_traffic.py holds the payloads against what torch.distributed is asked for
in real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.estimates.footprint import Counts, bucket_elements
from raytune_ft.config.estimates.pace import WHOLE_TENSORS
from raytune_ft.config.estimates.peak import LIVE_PARAMETERS
from raytune_ft.config.estimates.setting import Setting
from raytune_ft.config.schema import Recipe

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1}
"""Times that a ring passes (N - 1) / N of the payload on; of a broadcast, the mean over ranks."""


def sent(kind: str, payload: float, ranks: int) -> float:
    """Return the bytes that a rank sends for a collective in a ring (Patarasuk and Yuan 2009)."""
    return ROUNDS[kind] * payload * (ranks - 1) / ranks


@dataclass(frozen=True)
class Trained:
    """What an optimizer step trains, and how."""

    trained: int
    """Elements of the trained weights."""
    micro_steps: int
    """Forward and backward passes per step and rank."""
    width: int = 2
    """Bytes of a weight as the model computes with it."""
    summed: int = 4
    """Bytes of a gradient as it is summed over ranks: float32, whatever the weights are."""
    sharded: int = 0
    """Elements, trained or frozen, that stage 3 cuts up; the small ones stay whole."""
    fetches: int = 2
    """Times per micro-step that stage 3 puts a weight together: forward and backward, or once for
    both where it may keep it (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""
    whole: int = 0
    """Elements that stage 3 leaves whole, weights of 100,000 and fewer each."""
    parts: int = 1
    """Collectives in which a sum of all gradients goes: tensors of the plain engine, buckets."""
    fetched_parts: int = 1
    """Collectives in which stage 3 puts all weights together once."""


def payloads(stage: int, work: Trained, *, every_micro_step: bool = True) -> dict[str, int]:
    """Return the payload in bytes of one optimizer step, by kind; padding is left out.

    Args:
        stage: of ZeRO; 0 is the plain engine.
        work: what is trained.
        every_micro_step: whether stage 2 sums gradients over ranks behind each micro-step, as
            DeepSpeed does, or once a step.
    """
    gradients, weights = work.trained * work.summed, work.trained * work.width
    if stage == 0:
        return {"all_reduce": gradients}
    if stage == 1 or (stage == 2 and not every_micro_step):
        return {"all_reduce": gradients, "all_gather": weights}
    if stage == 2:
        return {"all_reduce": gradients * work.micro_steps, "all_gather": weights}
    fetched = work.fetches * work.micro_steps * work.sharded * work.width
    return {
        "all_gather": fetched + work.whole * work.width,
        "reduce_scatter": gradients * work.micro_steps,
    }


def calls(stage: int, work: Trained, *, every_micro_step: bool = True) -> dict[str, int]:
    """Return the collectives of one optimizer step, by kind: each takes a network's latency.

    Args:
        stage: as `payloads` takes it, like the next two.
        work: see there.
        every_micro_step: see there.
    """
    if stage == 0:
        return {"all_reduce": work.parts}
    if stage == 3:
        fetched = work.fetches * work.micro_steps * work.fetched_parts
        return {"all_gather": fetched, "reduce_scatter": work.micro_steps * work.parts}
    each = stage == 2 and every_micro_step
    return {"all_reduce": work.parts * (work.micro_steps if each else 1), "all_gather": 1}


def sent_by_model(wanted: dict[str, int], ranks: int) -> float:
    """Return the bytes that a rank sends for such payloads."""
    return sum(sent(kind, size, ranks) for kind, size in wanted.items())


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a recipe exchange in one optimizer step."""

    payloads: dict[str, int]
    """Kind of collective -> bytes."""
    calls: dict[str, int]
    """Kind -> collectives that carry them."""

    def sent(self, ranks: int) -> float:
        """Return the bytes that each of so many ranks sends."""
        return sent_by_model(self.payloads, ranks)


def exchange(recipe: Recipe, counts: Counts) -> Exchange:
    """Return what ranks with a GPU each exchange in an optimizer step.

    Args:
        recipe: in the layout that it trains in, since gradients may be summed at each micro-step.
        counts: of its model.
    """
    setting = Setting(recipe, counts, on_gpu=True)
    stage, work = setting.zero.stage, trained_of(setting)
    return Exchange(payloads(stage, work), calls(stage, work))


def trained_of(setting: Setting) -> Trained:
    """Return what an optimizer step of a recipe trains."""
    counts, trained = setting.counts, setting.counts.trained
    tensors = WHOLE_TENSORS if setting.is_full else 2 * counts.adapted
    # norms and biases are under stage 3's 100,000 elements each, adapters of r >= 32 over it
    whole = counts.other if setting.is_full else 0  # a frozen one is never gathered
    everything = counts.total + (0 if setting.is_full else trained)
    bucket = setting.zero.bucket or bucket_elements(trained)
    return Trained(
        trained,
        setting.recipe.train.accumulation,
        setting.adapter_width,
        sharded=everything - counts.other,
        fetches=1 if counts.total <= LIVE_PARAMETERS else 2,
        whole=whole,
        parts=-(-trained // bucket) if setting.zero.stage else tensors * counts.layers,
        fetched_parts=counts.layers,
    )
