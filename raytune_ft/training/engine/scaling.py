"""Loss scale of float16: gradients that would vanish are computed larger, and divided again.

The law is DeepSpeed's `DynamicLossScaler` without hysteresis, so that both engines take the same
steps: half after an overflow, double after a window of steps without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

INITIAL_POWER = 16
WINDOW = 1000
FACTOR_KEY, CLEAN_KEY = "loss_scale/factor", "loss_scale/clean_steps"


@dataclass
class LossScale:
    """What a loss is multiplied by before the backward pass; 1 and constant if not `dynamic`."""

    dynamic: bool
    factor: float = 1.0
    clean_steps: int = 0
    """Since the last overflow, or the beginning."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """Make the scale of a run that computes in `dtype`."""
        dynamic = dtype == torch.float16
        return cls(dynamic, float(2**INITIAL_POWER) if dynamic else 1.0)

    def update(self, *, overflowed: bool) -> None:
        """Learn what became of a step."""
        if not self.dynamic:
            return
        if overflowed:
            self.factor = max(1.0, self.factor / 2)
            self.clean_steps = 0
            return
        if self.clean_steps > 0 and self.clean_steps % WINDOW == 0:
            self.factor *= 2
        self.clean_steps += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps; nothing if the scale is constant."""
        if not self.dynamic:
            return {}
        return {
            FACTOR_KEY: torch.tensor(self.factor, dtype=torch.float64),
            CLEAN_KEY: torch.tensor(self.clean_steps),
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where a checkpoint's run was; from the beginning if it had no such scale."""
        if self.dynamic and FACTOR_KEY in state:
            self.factor = float(state[FACTOR_KEY])
            self.clean_steps = int(state[CLEAN_KEY])
