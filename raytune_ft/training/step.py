"""Step: one optimizer step's packs in, new weights and what came of it out.

A step is taken whole or not at all: where float16 overflows or memory ends, its gradients are
dropped and it is taken again, the same mathematics, as if that had not happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import TrainingError
from raytune_ft.training import stopping
from raytune_ft.training.batching import StepData
from raytune_ft.training.engine import Engine, TorchEngine, rank, world_size
from raytune_ft.training.guarding.pulse import PULSE
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.vitals import Vitals, gather, measures, take_sums

MAX_OVERFLOWS = 20
"""Halvings of the loss scale for one step: from 2**16 to below any that helps."""


@dataclass(frozen=True)
class Taken:
    """What came of one optimizer step."""

    loss: float
    """Per labelled token of the step, over all ranks."""
    grad_norm: float
    """Before clipping."""
    overflows: int
    """Times that float16 gradients overflowed and the step was taken again at a lower scale."""
    vitals: Vitals
    measures: dict[str, float]
    """What the objective measures beside its loss, such as `rewards_accuracy`."""


def take_step(
    engine: Engine,
    data: StepData,
    lr: float,
    state: TrainState,
    recipe: Recipe,
    waited: float,
    forward_seconds: Callable[[], float],
) -> Taken:
    """Take the step after `state.step`, again at a lower loss scale where float16 overflows.

    Raises:
        TrainingError: nothing to learn, or a loss or gradient that no weight should see; on every
            rank, whichever rank's it is.
        torch.OutOfMemoryError: on every rank that another rank's memory does not keep waiting.
    """
    step = state.step + 1
    if data.n_targets == 0:
        raise TrainingError(f"step {step}: no token of rows {data.row_ids[:5]} is trained")
    for overflows in range(MAX_OVERFLOWS):
        seed_step(recipe.train.seed, step)
        engine.module.train()
        take_sums(engine.module)  # of held-out rows, and of a step that overflowed
        started = time.perf_counter()
        loss_sum, full = _passes(engine, data)
        times = time.perf_counter() - started, waited, forward_seconds()
        PULSE.beat("exchange of the loss")
        sums = take_sums(engine.module)
        vitals = gather(loss_sum, full is not None, times, sums, engine.device)
        if vitals.full:
            raise full or torch.OutOfMemoryError("on another rank")
        loss = vitals.loss_sum / data.n_targets
        _stop_unless_finite("loss", loss, step, data)  # before the optimizer touches the weights
        stopping.check_spike(state, loss, recipe.train.loss_spike, data.row_ids)
        PULSE.beat("optimizer")
        grad_norm = engine.step(lr)
        if grad_norm is not None:
            _stop_unless_finite("gradient norm", grad_norm, step, data)
            told = measures(engine.module, vitals.sums)
            return Taken(loss, grad_norm, overflows, vitals, told)
    raise TrainingError(
        f"step {step}: float16 gradients of rows {data.row_ids[:5]} overflowed {MAX_OVERFLOWS} "
        "times in a row; set model.dtype: bfloat16 or float32"
    )


def _passes(engine: Engine, data: StepData) -> tuple[float, torch.OutOfMemoryError | None]:
    """Run all forward and backward passes; return the summed loss, and what ended them early."""
    loss_sum = torch.zeros((), device=engine.device)
    try:
        for number, batch in enumerate(data.micro_batches, start=1):
            PULSE.beat(f"passes {number} of {len(data.micro_batches)}")
            loss_sum += engine.forward_backward(batch, data.n_targets)
    except torch.OutOfMemoryError as error:
        if meets_in_passes(engine):
            raise  # the other ranks wait in this rank's backward pass, not for its loss
        return 0.0, error.with_traceback(None)  # its frames hold the activations
    return float(loss_sum), None  # waits for the device


def meets_in_passes(engine: Engine) -> bool:
    """Tell whether ranks exchange gradients within a step's passes, as ZeRO does."""
    return world_size() > 1 and not isinstance(engine, TorchEngine)


def seed_step(seed: int, step: int) -> None:
    """Seed torch from the step's number: dropout needs no state to go on exactly."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank())


def _stop_unless_finite(what: str, value: float, step: int, data: StepData) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: {what} is {value} on rows {data.row_ids[:5]}; "
            "lower train.lr or look at these rows; the last checkpoint is unharmed"
        )
