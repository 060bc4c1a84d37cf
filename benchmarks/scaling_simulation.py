"""What bandwidths leave out, drawn with seeds: ranks that are late, and GPUs that fail.

`slowest` draws every rank's step times and waits for the last. `run_with_failures` lets a run meet
failures at random, lose what it did since its last checkpoint, start again, and go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

HOUR = 3600.0


def slowest(ranks: int, spread: float, *, steps: int = 4000, seed: int = 0) -> float:
    """Return the mean time of a step's slowest rank, over the mean time of all.

    Args:
        ranks: that wait for each other in every step.
        spread: standard deviation of a rank's step times, over their mean; they vary
            independently, lognormally, from step to step and from rank to rank.
        steps: drawn.
        seed: of the draws.
    """
    sigma = math.sqrt(math.log1p(spread**2))
    times = np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, (steps, ranks))
    return float(times.max(axis=1).mean())


@dataclass(frozen=True)
class Failing:
    """A run on GPUs that fail; all in seconds."""

    gpu_s: float
    """Mean time between failures of one GPU and what belongs to it."""
    restart_s: float
    """From a failure to the next step."""
    save_s: float
    """That all ranks wait for a checkpoint."""

    def between(self, ranks: int) -> float:
        """Return the mean time between failures of a run, which any rank's ends."""
        return self.gpu_s / ranks

    def best_interval(self, ranks: int) -> float:
        """Return the work between checkpoints that loses the least (Daly 2006, first order)."""
        return math.sqrt(2 * self.save_s * self.between(ranks))


def goodput(failing: Failing, ranks: int, interval: float) -> float:
    """Return the expected share of time that is work, by formula (Daly 2006).

    Failures come at random at any moment, in a restart as well; then it begins anew.

    Args:
        failing: rates.
        ranks: of the run.
        interval: seconds of work between checkpoints.
    """
    mean = failing.between(ranks)
    again = mean * math.exp(failing.restart_s / mean)
    return interval / (again * math.expm1((interval + failing.save_s) / mean))


def run_with_failures(
    failing: Failing, ranks: int, interval: float, *, segments: int = 20_000, seed: int = 0
) -> float:
    """Return the share of time that was work in a run of so many intervals, by simulation.

    Args:
        failing: as `goodput` takes it, like the next two.
        ranks: see there.
        interval: see there.
        segments: intervals of the run.
        seed: of the failures.
    """
    random, mean = np.random.default_rng(seed), failing.between(ranks)
    now, fails = 0.0, random.exponential(mean)
    for _ in range(segments):
        while fails < (ends := now + interval + failing.save_s):
            now = fails  # what was done since the checkpoint is lost
            fails = now + random.exponential(mean)
            while fails < now + failing.restart_s:
                now = fails
                fails = now + random.exponential(mean)
            now += failing.restart_s
        now = ends
    return segments * interval / now
