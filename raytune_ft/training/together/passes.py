"""Passes: micro-batches of adapters that take the same step through one base, as many as fit.

Whoever asks first for the loss of a micro-batch runs it for all that sit beside it; the others find
theirs when they ask. Gradients are added up in each adapter's own weights, from its own rows.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raytune_ft.config.schema import TrainSection
from raytune_ft.model.loss import TokenLoss
from raytune_ft.model.seats import Seats
from raytune_ft.model.stacked import random_state, set_random_state
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import TorchEngine

ROWWISE = ("input_ids", "labels", "position_ids", "segment_ids")


class SharedEngine(TorchEngine):
    """The engine of one adapter, whose passes others may take part in."""

    def __init__(
        self,
        module: TokenLoss,
        device: torch.device,
        train: TrainSection,
        dtype: torch.dtype,
        *,
        b_lr_ratio: float | None,
        number: int,
        passes: Passes,
    ) -> None:
        """Wrap `module`, in which the adapter `number` sits now."""
        super().__init__(module, device, train, dtype, b_lr_ratio=b_lr_ratio)
        self.number, self.passes = number, passes

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        return self.passes.take(self, batch, n_targets)

    def alone(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        """Run a micro-batch for this adapter only, which sits."""
        return super().forward_backward(batch, n_targets)


@dataclass
class _Group:
    """Adapters whose rows go through the base in one pass, and what they have not asked for."""

    engines: list[SharedEngine]
    begun: list[tuple[TensorBatch, int]] = field(default_factory=list)
    """Micro-batches of the step so far, with the step's labelled tokens."""
    done: int = 0
    """How many of them are in the gradients."""
    found: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(adapter, micro-batch) -> summed loss."""


class Passes:
    """Decides who goes through the base with whom."""

    def __init__(self, seats: Seats, at_once: int) -> None:
        """Let at most `at_once` adapters go together."""
        self.seats, self.at_once = seats, max(1, at_once)
        self._groups: dict[int, _Group] = {}
        self._random: torch.Tensor | None = None

    def begin(self, engines: Sequence[SharedEngine]) -> None:
        """Name those that take the same step next, in the order in which they take it."""
        self._groups = {}
        self._part(engines)

    def _part(self, engines: Sequence[SharedEngine]) -> None:
        """Part some of them into groups that fit, none of which has begun its step."""
        for start in range(0, len(engines), self.at_once):
            group = _Group(list(engines[start : start + self.at_once]))
            self._groups |= {engine.number: group for engine in group.engines}

    def leave(self, engine: SharedEngine) -> None:
        """Run nothing for an adapter any more."""
        group = self._groups.pop(engine.number, None)
        if group is not None:
            group.engines = [one for one in group.engines if one is not engine]

    def take(self, engine: SharedEngine, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        """Add a micro-batch's gradient to an adapter's; return its summed loss."""
        group = self._groups[engine.number]
        number = next((i for i, (one, _) in enumerate(group.begun) if one is batch), None)
        if number is None and len(group.engines) > 1:
            number = len(group.begun)
            group.begun.append((batch, n_targets))
            group = self._together(group, engine)
        found = group.found.pop((engine.number, number), None) if number is not None else None
        self.seats.sit(engine.number)
        # what is asked for again was dropped by the engine itself: its loss scale was too large
        return engine.alone(batch, n_targets) if found is None else found

    def _together(self, group: _Group, asking: SharedEngine) -> _Group:
        """Run the last micro-batch that was begun; return the group that `asking` is in by now."""
        if len(group.begun) == 1:
            self._random = random_state(asking.device)
        while True:
            try:
                self._run(group, asking)
            except torch.OutOfMemoryError:
                if len(group.engines) == 1:
                    raise
            else:
                return group
            # behind the handler: the error's frames hold what was found too large
            group = self._smaller(group, asking)

    def _run(self, group: _Group, asking: SharedEngine) -> None:
        """Run what a group has begun and has no gradients of."""
        last = len(group.begun) - 1
        for number in range(group.done, last + 1):
            if len(group.engines) > 1:
                _pass(self.seats, group, number)
            else:
                self.seats.sit(asking.number)
                group.found[asking.number, number] = asking.alone(*group.begun[number])
            if number < last:
                del group.found[asking.number, number]  # it has been told of that one
            group.done = number + 1

    def _smaller(self, group: _Group, asking: SharedEngine) -> _Group:
        """Part a group in two; return the half with `asking`, which begins the step again.

        So does the other half, when it asks.
        """
        self.at_once = (len(group.engines) + 1) // 2
        for engine in group.engines:
            engine.drop_gradients()
        gc.collect()
        if asking.device.type == "cuda":
            torch.cuda.empty_cache()
        self._part(group.engines)
        half = self._groups[asking.number]
        half.begun = list(group.begun)
        set_random_state(self._random, asking.device)
        return half


def _pass(seats: Seats, group: _Group, number: int) -> None:
    """Run a micro-batch forward and backward for all of a group."""
    batch, n_targets = group.begun[number]
    engines = group.engines
    seats.sit(*(engine.number for engine in engines))
    module: Any = engines[0].module
    module.train()  # with the layers that sit there now
    losses, _ = module.token_losses(**stacked(engines[0].put(batch), len(engines)))
    parts = losses.unflatten(0, (len(engines), losses.numel() // len(engines)))
    sums = [part.sum() for part in parts]
    shares = [
        loss * (engine.scale.factor / n_targets) for loss, engine in zip(sums, engines, strict=True)
    ]
    torch.stack(shares).sum().backward()  # type: ignore[no-untyped-call]
    for engine, loss in zip(engines, sums, strict=True):
        group.found[engine.number, number] = loss.detach()


def stacked(batch: TensorBatch, times: int) -> TensorBatch:
    """Repeat a batch's rows `times` times, block by block; bounds and places follow."""
    made = {name: batch[name].repeat(times, 1) for name in ROWWISE}
    size = batch["input_ids"].numel()
    begins = torch.arange(times, device=batch["input_ids"].device).unsqueeze(1) * size
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"]
        inner = (bounds[:-1] + begins.to(bounds.dtype)).flatten()
        made["cu_seqlens"] = nn.functional.pad(inner, (0, 1), value=times * size)
        made["max_seqlen"] = batch["max_seqlen"]
    if "places" in batch:
        made["places"] = (batch["places"] + begins).flatten()
    return made
