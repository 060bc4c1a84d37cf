"""Learning rate as a pure function of how far a run is.

A run need not know its number of steps in advance: it is as far as the rows that it has visited.
Where the steps are known (`data.compat`), it is as far as its steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_ft.config.schema import TrainSection


@dataclass(frozen=True)
class Moment:
    """How far a run is before and behind an optimizer step.

    `step` is 0 for the first one. `before` and `behind` are shares of the whole run, 0 to 1.
    `warm` is the share at which a warm-up of `warmup_steps` ended; None before that.
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
    return math.ceil(train.warmup_ratio * total_steps)


def share_of(step: int, epochs_done: float, train: TrainSection) -> float:
    """Return how far a run is, 0 to 1, whichever of its ends is nearer.

    Args:
        step: optimizer steps done.
        epochs_done: epochs of rows visited.
        train: `epochs` and `max_steps` are read.
    """
    share = epochs_done / train.epochs
    if train.max_steps is not None:
        share = max(share, step / train.max_steps)
    return min(1.0, share)


def lr_at(moment: Moment, train: TrainSection) -> float:
    """Return the learning rate of an optimizer step.

    With p the share of the run before the step: `min_lr + (lr - min_lr) * f(p)`, f(p) = 1 - p
    (linear) or (1 + cos(pi p)) / 2, which is `torch.optim.lr_scheduler.CosineAnnealingLR`'s closed
    form with steps of rows. After a warm-up, p counts from the warm-up's end. The warm-up rises
    linearly and reaches `lr` in its last step.

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
    warm = (moment.warm or 0.0) if train.warmup_steps is not None else train.warmup_ratio
    progress = min(1.0, max(0.0, moment.before - warm) / max(1.0 - warm, 1e-12))
    if train.scheduler == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * share


def in_warmup(moment: Moment, train: TrainSection) -> bool:
    """Tell whether lr still rises; `warmup_steps` goes before `warmup_ratio`."""
    if train.warmup_steps is not None:
        return moment.step < train.warmup_steps
    return moment.before < train.warmup_ratio
