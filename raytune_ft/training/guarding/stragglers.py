"""Stragglers: seconds of each rank's forward passes in, a line on a rank that stays slow out.

Ranks wait for each other in backward passes, so whole steps take all of them the same time. In
forward passes they do not (but under ZeRO-3, which gathers weights there and hides who is slow).
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn

TIMES = 3.0
"""Slower than the median of the others by this, reliability list F14."""
STEPS = 20
"""So many in a row."""


class ForwardClock:
    """Times the forward passes of a network, on the device where it has a clock."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None
        module.register_forward_pre_hook(lambda *_: self.begin())
        module.register_forward_hook(lambda *_: self.end())

    def take(self) -> float:
        """Return the seconds since the last call; the device has to be done with them."""
        spans, self._spans = self._spans, []
        if self.on_gpu:
            return sum(float(begin.elapsed_time(end)) for begin, end in spans) / 1e3
        return float(sum(end - begin for begin, end in spans))

    def begin(self) -> None:
        """Begin a pass."""
        self._begun = self._now()

    def end(self) -> None:
        """End it."""
        if torch.is_grad_enabled():  # held-out rows and answers are no training
            self._spans.append((self._begun, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Stragglers:
    """Counts for how long each rank has been slow."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}

    def update(self, step: int, seconds: list[float]) -> list[str]:
        """Take a step's seconds by rank into account; return a line for each rank, told once."""
        lines = []
        for rank, own in enumerate(seconds):
            others = [value for other, value in enumerate(seconds) if other != rank]
            usual = median(others) if others else own
            self._slow[rank] = self._slow.get(rank, 0) + 1 if own > TIMES * usual > 0 else 0
            if self._slow[rank] == STEPS:
                lines.append(
                    f"step {step}: rank {rank} has been {own / usual:.1f} times slower than the "
                    f"others for {STEPS} steps ({own:.2f} s against {usual:.2f} s); all wait for "
                    "it; look at its machine"
                )
        return lines
