"""Traffic: what ranks send each other, counted as torch.distributed is asked, and by arithmetic.

`Count` puts itself round the collectives of torch.distributed, which DeepSpeed, the plain engine
and our own exchanges all call; it reads sizes and no tensor. `payloads` is the model of
docs/scaling.md. A payload is the whole tensor of a collective: what is summed, or what every rank
holds behind a gathering. `sent` turns it into the bytes that one rank sends in a ring.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

KINDS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_gather": ("all_gather", "tensor_list"),
    "all_gather_into_tensor": ("all_gather", "output_tensor"),
    "all_gather_single": ("all_gather", "output_tensor"),
    "_all_gather_base": ("all_gather", "output_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_single": ("reduce_scatter", "input"),
    "_reduce_scatter_base": ("reduce_scatter", "input"),
    "broadcast": ("broadcast", "tensor"),
    "reduce": ("reduce", "tensor"),
}
"""Function of torch.distributed -> kind, and the argument that is the payload."""
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1}
"""Times that a ring passes (N - 1) / N of the payload on; of a broadcast, the mean over ranks."""
SMALL = 1024
"""Bytes; below are norms, flags and losses, which every step exchanges whatever it trains."""


def sent(kind: str, payload: float, ranks: int) -> float:
    """Return the bytes that a rank sends for a collective in a ring (Patarasuk and Yuan 2009)."""
    return ROUNDS[kind] * payload * (ranks - 1) / ranks


@dataclass
class Count:
    """Payloads of the collectives of this process since the last `take`."""

    payloads: dict[str, int] = field(default_factory=dict)
    """Kind -> bytes, of collectives of `SMALL` bytes and more."""
    calls: dict[str, int] = field(default_factory=dict)
    small: int = 0
    """Bytes of the others."""

    def add(self, kind: str, size: int) -> None:
        """Note one collective."""
        if size < SMALL:
            self.small += size
            return
        self.payloads[kind] = self.payloads.get(kind, 0) + size
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def take(self) -> Count:
        """Return what was counted, and begin anew."""
        taken = Count(self.payloads, self.calls, self.small)
        self.payloads, self.calls, self.small = {}, {}, 0
        return taken

    def sent(self, ranks: int) -> float:
        """Return the bytes that one of so many ranks sends for them."""
        return sum(sent(kind, size, ranks) for kind, size in self.payloads.items())


def count(into: Count) -> Callable[[], None]:
    """Count every collective of this process; return what ends that.

    DeepSpeed keeps some of these functions from its start on, so this goes before it.
    """
    kept = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}
    for name, real in kept.items():
        setattr(dist, name, _counted(real, *KINDS[name], into))

    def end() -> None:
        for name, real in kept.items():
            setattr(dist, name, real)

    return end


@contextmanager
def counted() -> Iterator[Count]:
    """Count while the block runs."""
    into = Count()
    end = count(into)
    try:
        yield into
    finally:
        end()


def _counted(real: Any, kind: str, argument: str, into: Count) -> Any:
    names = list(inspect.signature(real).parameters)
    place = names.index(argument)

    @functools.wraps(real)
    def counting(*args: Any, **kwargs: Any) -> Any:
        given = kwargs[argument] if argument in kwargs else args[place]
        into.add(kind, _size(given))
        return real(*args, **kwargs)

    return counting


def _size(given: Any) -> int:
    if torch.is_tensor(given):
        return given.numel() * given.element_size()
    return sum(_size(one) for one in given)


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


def sent_by_model(wanted: dict[str, int], ranks: int) -> float:
    """Return the bytes that a rank sends for such payloads."""
    return sum(sent(kind, size, ranks) for kind, size in wanted.items())
