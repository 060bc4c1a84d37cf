"""Stopping: when a run ends before its last step, and which of its checkpoints is the best.

All of it is a function of the run's state, so that a resumed run stops at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from raytune_ft.config.schema import EvalSection
from raytune_ft.errors import TrainingError
from raytune_ft.training.saving.checkpoint import TrainState

REMEMBERED = 50
"""Losses that a spike is compared with."""
ENOUGH = 10
"""Losses without which none is called a spike: the first ones fall fast."""


def remember(state: TrainState, loss: float) -> None:
    """Keep the loss of a step that was taken."""
    state.losses = [*state.losses, loss][-REMEMBERED:]


def check_spike(state: TrainState, loss: float, limit: float | None, rows: list[int]) -> None:
    """Stop before a step whose loss is over `limit` times the median of the last ones.

    Raises:
        TrainingError: names the step, its rows and what to do.
    """
    if limit is None or len(state.losses) < ENOUGH:
        return
    usual = median(state.losses)
    if loss > limit * usual:
        raise TrainingError(
            f"step {state.step + 1}: loss {loss:.4g} is {loss / usual:.1f} times the usual "
            f"{usual:.4g} (train.loss_spike {limit:g}) on rows {rows[:5]}; look at these rows, "
            "lower train.lr, or resume with train.loss_spike=null"
        )


def reconsider(state: TrainState, wanted: EvalSection) -> None:
    """Bring what is known of the best into line with the recipe, when a run is taken up.

    Patience may have been changed, and then decides anew whether the run has ended. The best of
    one metric is none of another: it is forgotten.
    """
    if state.best_metric != wanted.metric:
        state.best, state.best_step, state.waited = None, 0, 0
    state.best_metric = wanted.metric
    state.stopped = wanted.patience is not None and state.waited >= wanted.patience


def judge(state: TrainState, measured: Mapping[str, float] | None, wanted: EvalSection) -> bool:
    """Take a measurement into account; return whether it is the best so far.

    Behind `reconsider`.

    Raises:
        TrainingError: the metric is not a number.
    """
    if measured is None:
        return False
    value = measured[wanted.metric]
    if math.isnan(value):
        raise TrainingError(
            f"step {state.step}: {wanted.metric} of the held-out rows is not a number; "
            "lower train.lr or look at data.validation"
        )
    sign = 1.0 if wanted.mode == "min" else -1.0
    if state.best is None or sign * value < sign * state.best - wanted.min_delta:
        state.best, state.best_step, state.waited = value, state.step, 0
        return True
    state.waited += 1
    state.stopped = wanted.patience is not None and state.waited >= wanted.patience
    return False
