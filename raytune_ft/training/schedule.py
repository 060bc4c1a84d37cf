"""Learning rate as a pure function of how far a run is.

A run need not know its number of steps in advance: it is as far as the rows that it has visited.
Where the steps are known (`data.compat`), it is as far as its steps. With steps of equal rows
both are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_ft.config.schema import TrainSection


@dataclass(frozen=True)
class Moment:
    """How far a run is before and behind an optimizer step.

    `step` is 0 for the first one. `before` and `behind` are shares of the whole run, 0 to 1.
    `warm` is the share at which the warm-up ended; None if there was none so far.
    """

    step: int
    before: float
    behind: float
    warm: float | None = None

    @classmethod
    def of_steps(cls, step: int, total_steps: int, train: TrainSection) -> Moment:
        """Return the moment of a step where their number is known."""
        warm = count_warmup(total_steps, train) / total_steps
        return cls(step, step / total_steps, (step + 1) / total_steps, warm)


def count_warmup(total_steps: int, train: TrainSection) -> int:
    """Count the optimizer steps in which lr rises; `warmup_steps` goes before `warmup_ratio`.

    May exceed `total_steps`: the run then ends while lr still rises, as with transformers'
    schedules.
    """
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is above 7


def share_of(step: int, epochs_done: float, train: TrainSection) -> float:
    """Return how far a run is, 0 to 1: of its two ends, the nearer one counts.

    Args:
        step: optimizer steps done.
        epochs_done: epochs of rows visited.
        train: `epochs` and `max_steps` are read.
    """
    share = epochs_done / train.epochs
    if train.max_steps is not None:
        share = max(share, step / train.max_steps)
    return min(1.0, share)


def expected_steps(step: int, epochs_done: float, train: TrainSection) -> tuple[int, bool]:
    """Conclude from the steps so far, at least one, to those of the whole run.

    Returns:
        The number, and whether it is sure: at the end, and where `max_steps` is much nearer than
        the end of the epochs.
    """
    share = share_of(step, epochs_done, train)
    by_steps = 0.0 if train.max_steps is None else step / train.max_steps
    sure = share == 1.0 or epochs_done / train.epochs < 0.8 * by_steps
    return max(round(step / share), step + (share < 1.0)), sure


def lr_at(moment: Moment, train: TrainSection) -> float:
    """Return the learning rate of an optimizer step.

    In the warm-up it rises in proportion to the steps done (`warmup_steps`) or to the share of the
    run done (`warmup_ratio`), this step included, so that it is never 0 and reaches `lr` in the
    warm-up's last step. Then it is `min_lr + (lr - min_lr) * f(p)`, p the share done before the
    step of what follows the warm-up, f(p) = 1 - p (linear) or (1 + cos(pi p)) / 2: the closed
    form of `torch.optim.lr_scheduler.CosineAnnealingLR`.

    Args:
        moment: where the step lies.
        train: `lr`, `min_lr`, `scheduler`, `warmup_ratio` and `warmup_steps` are read.
    """
    if in_warmup(moment, train):
        if train.warmup_steps is not None:
            return train.lr * (moment.step + 1) / train.warmup_steps
        return train.lr * min(1.0, moment.behind / train.warmup_ratio)
    if train.scheduler == "constant":
        return train.lr
    warm = moment.warm or 0.0
    left = 1.0 - warm  # 0 where the warm-up took the whole run
    done = min(1.0, max(0.0, moment.before - warm) / left) if left > 0.0 else 1.0
    share = 1.0 - done if train.scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return train.min_lr + (train.lr - train.min_lr) * share


def in_warmup(moment: Moment, train: TrainSection) -> bool:
    """Tell whether lr still rises; `warmup_steps` goes before `warmup_ratio`."""
    if train.warmup_steps is not None:
        return moment.step < train.warmup_steps
    return moment.before < train.warmup_ratio
