"""The training loop, one page: rare events first, the optimizer step last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.data.report import add_report
from raytune_ft.errors import Interrupted, TrainingError
from raytune_ft.training import data_record, stopping
from raytune_ft.training.batching import StepData
from raytune_ft.training.checkpoint import TrainState
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.eta import Eta
from raytune_ft.training.schedule import Moment, expected_steps, in_warmup, lr_at, share_of
from raytune_ft.training.throughput import Meter
from raytune_ft.training.vitals import Vitals, gather, measures, take_sums

MAX_OVERFLOWS = 20
"""Halvings of the loss scale for one step: from 2**16 to below any that helps."""


class Emit(Protocol):
    """Record one event of a run; only rank 0's goes anywhere."""

    def __call__(self, kind: str, /, **fields: object) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What happens between optimizer steps. Every rank calls each hook at the same step."""

    sample: Callable[[int, str], None]
    """(step, when) -> answers to the recipe's prompts."""
    validate: Callable[[int], dict[str, float] | None]
    """step -> what was measured on the held-out rows, `val_loss` and others, if there are any."""
    benchmark: Callable[[int], None]
    """step -> answers to the recipe's MMLU questions."""
    record: Callable[[TrainState, int], None]
    """(state, steps of the run) -> what became of the rows, written down."""
    save: Callable[[TrainState], None]
    interrupted: Callable[[], bool]
    """Whether this rank was asked to stop; one rank is enough, all stop after the same step."""


def train(
    engine: Engine,
    recipe: Recipe,
    steps: Iterator[StepData],
    state: TrainState,
    total_steps: int | None,
    hooks: Hooks,
    emit: Emit,
    known_steps: int | None = None,
) -> TrainState:
    """Run from `state` to the end of the recipe's epochs, or to `max_steps`.

    Args:
        steps: this rank's data, from `state`'s position on.
        state: changed in place and returned.
        total_steps: of the whole run, where the learning rate goes by steps; None where it goes
            by rows.
        known_steps: of the whole run, where they are sure though the learning rate goes by rows.

    Raises:
        TrainingError: the loss or gradient is not finite, or a step has no labelled token.
        Interrupted: the run was asked to stop; its checkpoint is written.
    """
    seed_step(recipe.train.seed, state.step)
    again = recipe.train.objective == "dpo"  # the first model sees every token as well
    eta = Eta(recipe)
    meter = Meter.of(engine.module, engine.device, world_size(), forward_again=again)
    hooks = eta.timed_hooks(hooks)
    if state.step == 0:
        hooks.sample(0, "before")
    while not ended(state, recipe):
        started = time.perf_counter()
        data = _next(steps, state, recipe)
        waited = time.perf_counter() - started
        lr = lr_at(moment(state, data, total_steps, recipe), recipe.train)
        taken = take_step(engine, data, lr, state, recipe, waited, hooks.interrupted)
        seconds = time.perf_counter() - started
        _advance(state, data, total_steps, recipe)
        stopping.remember(state, taken.loss)
        first_epoch_ends = data.ends_epoch and data.epoch == 0
        _tell_of_rows(state, data, first_epoch_ends, emit)

        measured, improved = None, False
        last = ended(state, recipe)
        if last or _due(recipe.eval.every, state.step, data):
            measured = hooks.validate(state.step)
            improved = stopping.judge(state, measured, recipe.eval)
            last = last or ended(state, recipe)
        share, total, exact = progress(state, total_steps, recipe, known_steps)
        emit(
            "step", step=state.step, epoch=data.epoch, progress=state.progress, share=share,
            total=total, exact=exact, loss=taken.loss, lr=lr, grad_norm=taken.grad_norm,
            overflows=taken.overflows, tokens=data.n_tokens, targets=data.n_targets,
            seconds=seconds, data_seconds=waited, rank_seconds=taken.vitals.seconds,
            eta_seconds=eta.left(state.step, state.progress, share, total, exact=exact),
            **meter.figures(
                tokens=data.n_tokens, targets=data.n_targets, pairs=data.n_pairs,
                seconds=seconds, waited=taken.vitals.waited,
            ),
            rows=data.row_ids, **taken.measures, **{"val_loss": None, **(measured or {})},
        )  # fmt: skip
        every = recipe.chat_eval.every
        if every and state.step % every == 0 and not last:
            hooks.sample(state.step, "step")
        if last or data.ends_epoch:
            hooks.benchmark(state.step)
        stop = taken.vitals.interrupted and not last
        due = last or improved or stop or _due(recipe.checkpoint.every, state.step, data)
        if due or first_epoch_ends:
            hooks.record(state, total)
        if due:
            hooks.save(state)
        if stop:
            raise Interrupted(f"stopped after step {state.step}; its checkpoint is written")
    hooks.sample(state.step, "after")
    return state


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
    interrupted: Callable[[], bool],
) -> Taken:
    """Take the step after `state.step`, again at a lower loss scale where float16 overflows.

    Raises:
        TrainingError: nothing to learn, or a loss or gradient that no weight should see.
    """
    step = state.step + 1
    if data.n_targets == 0:
        raise TrainingError(f"step {step}: no token of rows {data.row_ids[:5]} is trained")
    for overflows in range(MAX_OVERFLOWS):
        seed_step(recipe.train.seed, step)
        engine.module.train()
        take_sums(engine.module)  # of held-out rows, and of a step that overflowed
        started = time.perf_counter()
        loss_sum = torch.zeros((), device=engine.device)
        for batch in data.micro_batches:
            loss_sum += engine.forward_backward(batch, data.n_targets)
        seconds, sums = time.perf_counter() - started, take_sums(engine.module)
        vitals = gather(loss_sum, interrupted(), seconds, waited, sums)
        loss = vitals.loss_sum / data.n_targets
        _stop_unless_finite("loss", loss, step, data)  # before the optimizer touches the weights
        stopping.check_spike(state, loss, recipe.train.loss_spike, data.row_ids)
        grad_norm = engine.step(lr)
        if grad_norm is not None:
            _stop_unless_finite("gradient norm", grad_norm, step, data)
            told = measures(engine.module, vitals.sums)
            return Taken(loss, grad_norm, overflows, vitals, told)
    raise TrainingError(
        f"step {step}: float16 gradients of rows {data.row_ids[:5]} overflowed {MAX_OVERFLOWS} "
        "times in a row; set model.dtype: bfloat16 or float32"
    )


def _next(steps: Iterator[StepData], state: TrainState, recipe: Recipe) -> StepData:
    data = next(steps, None)
    if data is None:
        raise TrainingError(
            f"step {state.step + 1}: the data ended in epoch {state.epoch + 1} of "
            f"{recipe.train.epochs}"
        )
    return data


def seed_step(seed: int, step: int) -> None:
    """Seed torch from the step's number: dropout needs no state to go on exactly."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank())


def ended(state: TrainState, recipe: Recipe) -> bool:
    """Tell whether a run has done all of its epochs, or `max_steps`, or was stopped early."""
    return (
        state.stopped or state.epoch >= recipe.train.epochs or state.step == recipe.train.max_steps
    )


def progress(
    state: TrainState, total_steps: int | None, recipe: Recipe, known_steps: int | None = None
) -> tuple[float, int, bool]:
    """Return how far a run is behind its steps so far: share of it, its steps, whether exactly."""
    if ended(state, recipe):
        return 1.0, state.step, True
    sure = recipe.eval.patience is None
    if total_steps is not None:
        return state.step / total_steps, total_steps, sure
    share = share_of(state.step, state.progress, recipe.train)
    if known_steps is not None:
        return share, known_steps, sure
    total, exact = expected_steps(state.step, state.progress, recipe.train)
    return share, total, exact and sure


def moment(state: TrainState, data: StepData, total_steps: int | None, recipe: Recipe) -> Moment:
    """Return how far the run is before and behind the step that `data` is for."""
    if total_steps is not None:
        return Moment.of_steps(state.step, total_steps, recipe.train)
    before = share_of(state.step, state.progress, recipe.train)
    behind = share_of(state.step + 1, data.progress, recipe.train)
    return Moment(state.step, before, behind, state.warm)


def _advance(state: TrainState, data: StepData, total_steps: int | None, recipe: Recipe) -> None:
    done = moment(state, data, total_steps, recipe)
    if in_warmup(done, recipe.train):
        state.warm = done.behind
    state.step += 1
    state.epoch, state.window, state.pack = (
        data.position.epoch, data.position.window, data.position.pack,
    )  # fmt: skip
    state.progress = data.progress
    state.tokens += data.n_tokens
    state.targets += data.n_targets


def _tell_of_rows(state: TrainState, data: StepData, ends: bool, emit: Emit) -> None:
    """Count what became of the first epoch's rows; say so when a new kind of loss comes up."""
    if data.epoch > 0:
        return
    known = data_record.kinds(state.rows)
    add_report(state.rows, data.report)
    state.packs += data.n_packs
    state.pack_tokens += data.n_tokens
    found = data_record.kinds(state.rows)
    if found - known or (ends and found):
        line = data_record.loss_line(state.rows)
        emit("rows", step=state.step, text=f"first epoch: {line}" if ends else line)


def _due(every: int | str, step: int, data: StepData) -> bool:
    return data.ends_epoch if isinstance(every, str) else step % every == 0


def _stop_unless_finite(what: str, value: float, step: int, data: StepData) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: {what} is {value} on rows {data.row_ids[:5]}; "
            "lower train.lr or look at these rows; the last checkpoint is unharmed"
        )
