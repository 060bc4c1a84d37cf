"""Halving: values of trials at a few steps in, which trials go on out; no Ray, no clock.

Asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020): at each rung a trial goes on if it is among the best part of those that were
there. Which those are is a matter of luck there, of who came first. Here they are the trials of
lower numbers, as if results came in the order of numbers: so the same trials go on however many
run at once, however often a driver is killed, and in whichever order they end.

A trial that is ahead of one with a lower number trains on until that one has come to the rung too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

REDUCTION = 2


def rungs_of(total_steps: int) -> list[int]:
    """Return the steps at which trials of `total_steps` steps are compared: a quarter, a half."""
    steps = {max(1, total_steps // 4), max(1, total_steps // 2)}
    return sorted(step for step in steps if step < total_steps)


@dataclass
class Halving:
    """Who goes on.

    Args:
        rungs: optimizer steps at which trials are compared, rising; none stops nobody.
        mode: `min` or `max`, the good end of values.
        reduction: one of so many goes on.
    """

    rungs: Sequence[int]
    mode: str = "min"
    reduction: int = REDUCTION
    _values: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    _verdicts: dict[tuple[int, int], bool] = field(default_factory=dict)

    def on_value(self, trial: int, step: int, value: float) -> bool:
        """Take what a trial has after `step`; return whether it goes on, as far as is known.

        What counts at a rung is the first value at its step or behind it. Told again it changes
        nothing.
        """
        for rung in self.unmet(trial, step):
            self._values[trial, rung] = (step, value)
        return self.goes_on(trial)

    def unmet(self, trial: int, step: int) -> list[int]:
        """Return the rungs up to `step` at which nothing is known of a trial."""
        if trial in self._ended:
            return []
        met = (k for k in range(len(self.rungs)) if self.rungs[k] <= step)
        return [k for k in met if (trial, k) not in self._values]

    def on_end(self, trial: int) -> None:
        """Note that nothing more will come of a trial, whatever ended it."""
        self._ended.add(trial)

    def goes_on(self, trial: int) -> bool:
        """Tell whether a trial goes on, as far as is known."""
        return self.stopped_at(trial) is None

    def stopped_at(self, trial: int) -> tuple[int, float] | None:
        """Return the (step, value) for which a trial is stopped; None if it is not."""
        for rung in range(len(self.rungs)):
            verdict = self._verdict(trial, rung)
            if verdict is None:
                return None
            if not verdict:
                return self._values[trial, rung]
        return None

    def is_settled(self, trial: int) -> bool:
        """Tell whether every rung that a trial has come to is decided, or it is stopped."""
        for rung in range(len(self.rungs)):
            if (trial, rung) not in self._values:
                return True
            verdict = self._verdict(trial, rung)
            if verdict is None:
                return False
            if not verdict:
                return True
        return True

    def _verdict(self, trial: int, rung: int) -> bool | None:
        """Tell whether a trial goes on behind a rung; None while that is open."""
        if (trial, rung) not in self._values:
            return None
        if (trial, rung) not in self._verdicts:
            there = [self._is_there(other, rung) for other in range(trial)]
            if None in there or not self._is_there(trial, rung):
                return None
            others = [self._worth(other, rung) for other in range(trial) if there[other]]
            own = self._worth(trial, rung)
            place = 1 + sum(other < own for other in others)
            last = math.ceil((len(others) + 1) / self.reduction)
            self._verdicts[trial, rung] = math.isfinite(own) and place <= last
        return self._verdicts[trial, rung]

    def _is_there(self, trial: int, rung: int) -> bool | None:
        """Tell whether a trial is compared at a rung; None while that is open."""
        for earlier in range(rung):
            verdict = self._verdict(trial, earlier)
            if verdict is False:
                return False
            if verdict is None:
                gone = trial in self._ended and (trial, earlier) not in self._values
                return False if gone else None
        if (trial, rung) in self._values:
            return True
        return False if trial in self._ended else None

    def _worth(self, trial: int, rung: int) -> float:
        """Return a value whose lower end is good; of no finite one the worst."""
        value = self._values[trial, rung][1]
        if not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value
