"""ETA: seconds that a run still takes, from what its last steps and its other work took.

What is between two steps is measured apart: a validation of a minute every hundred steps is
neither spread over the next twenty nor forgotten. Kinds of work that did not happen yet count as
nothing, so an early figure is a lower bound where saving or sampling takes long.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any, TypeVar

from raytune_ft.config.schema import Recipe

STEADY_STEPS = 200
"""Steps that are averaged as long as the last ones are like them."""
RECENT_STEPS = 20
"""Steps that count alone once they are not."""
RECENT_TIMES = 5
"""Of each other kind of work."""
STALL = 5.0
"""A step over so many times the median counts as that: a stall is no habit."""
CHANGE = 3.0
"""Standard errors by which the last steps must stray from all to be another pace."""
EXTRAS = ("sample", "validate", "benchmark", "save")
"""Fields of `loop.Hooks` that take time of their own."""

H = TypeVar("H")


class Eta:
    """Watches one process's loop; its first step, which warms up, is left out."""

    def __init__(self, recipe: Recipe, clock: Callable[[], float] = time.perf_counter) -> None:
        self._recipe, self._clock = recipe, clock
        self._last = clock()
        self._aside = 0.0
        self._ticks = 0
        self._steps: deque[float] = deque(maxlen=STEADY_STEPS)
        self._extras: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_TIMES))

    def timed_hooks(self, hooks: H) -> H:
        """Return a dataclass of hooks whose `EXTRAS` are measured from now on."""
        watched = {name: self._timed(name, getattr(hooks, name)) for name in EXTRAS}
        return replace(hooks, **watched)  # type: ignore[type-var]

    def left(self, step: int, progress: float, share: float, total: int, *, exact: bool) -> float:
        """Note the end of a step; return the seconds from now to the end of training.

        Args:
            step: optimizer steps done, at least 1.
            progress: epochs of rows visited.
            share: of the run that is done, over 0 to 1.
            total: steps of the run.
            exact: whether `total` is sure; else `share` tells the steps to come.
        """
        now = self._clock()
        if self._ticks == 1:
            self._steps.clear()  # the first step gives way to the second
        self._steps.append(now - self._last - self._aside)
        self._last, self._aside = now, 0.0
        self._ticks += 1
        ahead = total - step if exact else step / share - step
        seconds = ahead * usual_seconds(list(self._steps))
        to_come = self._to_come(step, step + ahead, progress, progress / share)
        return seconds + sum(
            count * median(self._extras[kind]) for kind, count in to_come.items()
            if self._extras[kind]
        )  # fmt: skip

    def _to_come(self, step: int, total: float, progress: float, end: float) -> dict[str, int]:
        """Count what comes after this step's line; only validation comes before a line."""
        recipe, last = self._recipe, math.ceil(total - 1e-6)
        behind, before = (step, last, progress, end), (step + 1, last, progress + 1e-6, end)
        return {
            "validate": _due(recipe.eval.every, *before) + (step < last),
            "save": _due(recipe.checkpoint.every, *behind) + 1,
            "sample": _due(recipe.chat_eval.every, *behind) + 1,
            "benchmark": _due("epoch", *behind) + 1,
        }

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def timed(*args: Any) -> Any:
            started = self._clock()
            result = hook(*args)
            took = self._clock() - started
            self._extras[name].append(took)
            self._aside += took
            return result

        return timed


def usual_seconds(steps: list[float]) -> float:
    """Return what a step takes by now: the mean of many, unless the last ones are others.

    Twenty steps tell a change of pace; more of them are needed against the noise of rows whose
    lengths differ. A stall counts as a long step, not as what it took.

    Args:
        steps: seconds of the last steps, at least one, oldest first.
    """
    recent = steps[-RECENT_STEPS:]
    limit = STALL * median(recent)
    recent = [min(one, limit) for one in recent]
    whole = mean(min(one, limit) for one in steps)
    if len(recent) < RECENT_STEPS:
        return whole
    strays = CHANGE * stdev(recent) / math.sqrt(len(recent))
    return mean(recent) if abs(mean(recent) - whole) > strays else whole


def _due(every: int | str | None, first: int, last: int, progress: float, end: float) -> int:
    """Count the steps from `first` on, before `last`, at which something is due."""
    if every is None:
        return 0
    if isinstance(every, str):
        return max(0, math.ceil(end - 1e-6) - math.ceil(progress - 1e-9))
    return max(0, (last - 1) // every - (first - 1) // every)
