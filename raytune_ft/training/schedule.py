"""Learning rate as a pure function of the optimizer step, so that a resume needs no state."""

import math

from raytune_ft.config.schema import TrainSection


def lr_at(step: int, total_steps: int, train: TrainSection) -> float:
    """Return the learning rate of optimizer step `step`.

    Args:
        step: 0 for the first optimizer step.
        total_steps: optimizer steps of the whole run, at least 1.
        train: `lr`, `min_lr`, `scheduler`, `warmup_ratio` and `warmup_steps` are read.

    Cosine is `torch.optim.lr_scheduler.CosineAnnealingLR`'s closed form after the warm-up; the
    warm-up rises linearly and reaches `lr` in its last step.
    """
    warmup_steps = count_warmup(total_steps, train)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    if train.scheduler == "constant":
        return train.lr
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = min(1.0, progress)
    if train.scheduler == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr + (train.lr - train.min_lr) * share


def count_warmup(total_steps: int, train: TrainSection) -> int:
    """Count the optimizer steps in which lr rises; `warmup_steps` goes before `warmup_ratio`.

    May exceed `total_steps`: the run then ends while lr still rises, as with transformers'
    schedules.
    """
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_ratio * total_steps)
