"""Learning rate as a pure function of the optimizer step, so that a resume needs no state."""

import math

from raytune_ft.config.schema import TrainSection


def lr_at(step: int, total_steps: int, train: TrainSection) -> float:
    """Return the learning rate of optimizer step `step`.

    Args:
        step: 0 for the first optimizer step.
        total_steps: optimizer steps of the whole run, at least 1.
        train: `lr`, `min_lr`, `scheduler` and `warmup_ratio` are read.

    Cosine is `torch.optim.lr_scheduler.CosineAnnealingLR`'s closed form after the warm-up; the
    warm-up rises linearly and reaches `lr` in its last step.
    """
    warmup_steps = math.ceil(train.warmup_ratio * total_steps)
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
