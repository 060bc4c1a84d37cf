"""The training loop, one page: rare events first, the optimizer step last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import Interrupted, RaytuneError, TrainingError
from raytune_ft.training import course, stopping
from raytune_ft.training.batching import StepData
from raytune_ft.training.engine import Engine, world_size
from raytune_ft.training.guarding.pulse import PULSE
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.guarding.stragglers import ForwardClock, Stragglers
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.schedule import lr_at
from raytune_ft.training.step import seed_step, take_step
from raytune_ft.training.vitals import agree
from raytune_ft.training.watching import data_record
from raytune_ft.training.watching.eta import Eta
from raytune_ft.training.watching.throughput import Meter


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
    """Whether this rank was asked to stop; one rank is enough, all stop before the same step."""


def train(
    engine: Engine,
    recipe: Recipe,
    steps: Iterator[StepData],
    state: TrainState,
    total_steps: int | None,
    hooks: Hooks,
    emit: Emit,
    known_steps: int | None = None,
    room: Room | None = None,
) -> TrainState:
    """Run from `state` to its end, as `training` says; return it."""
    run = training(engine, recipe, steps, state, total_steps, hooks, emit, known_steps, room)
    deque(run, maxlen=0)
    return state


def training(
    engine: Engine,
    recipe: Recipe,
    steps: Iterator[StepData],
    state: TrainState,
    total_steps: int | None,
    hooks: Hooks,
    emit: Emit,
    known_steps: int | None = None,
    room: Room | None = None,
) -> Iterator[None]:
    """Run from `state` to the end of the recipe's epochs, or to `max_steps`; stop at each step.

    Args:
        steps: this rank's data, from `state`'s position on.
        state: changed in place.
        total_steps: of the whole run, where the learning rate goes by steps; None where it goes
            by rows.
        known_steps: of the whole run, where they are sure though the learning rate goes by rows.
        room: what a step does whose packs do not fit into memory; None: it ends the run.

    Yields:
        Behind each optimizer step, once all is done that comes before the next.

    Raises:
        TrainingError: the loss or gradient is not finite, or a step has no labelled token.
        Interrupted: the run was asked to stop; its checkpoint is written.
    """
    seed_step(recipe.train.seed, state.step)
    eta = Eta(recipe)
    meter = Meter.of(
        engine.module, engine.device, world_size(),
        forward_again=recipe.train.objective == "dpo",  # the first model sees every token as well
    )  # fmt: skip
    clock = engine.timed_by(ForwardClock(engine.module, engine.device))
    stragglers = Stragglers()
    hooks = eta.timed_hooks(hooks)
    saved = state.step
    room = room or Room.of(recipe)
    stopping.reconsider(state, recipe.eval)
    if state.step == 0:
        hooks.sample(0, "before")
    while not course.ended(state, recipe):
        started = time.perf_counter()
        begun = next_step(steps, state, recipe, hooks.interrupted(), engine)
        if begun is None:
            if saved != state.step:
                hooks.record(state, course.progress(state, total_steps, recipe, known_steps)[1])
                hooks.save(state)
            raise Interrupted(f"stopped after step {state.step}")
        data, waited = begun
        lr = lr_at(course.moment(state, data, total_steps, recipe), recipe.train)
        taken = room.take(
            lambda fitting, lr=lr, waited=waited: take_step(  # type: ignore[misc]
                engine, fitting, lr, state, recipe, waited, clock.take
            ),
            engine, data, state.step + 1,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        course.advance(state, data, total_steps, recipe)
        stopping.remember(state, taken.loss)
        first_epoch_ends = data.ends_epoch and data.epoch == 0
        for line in data_record.count(state, data, ends=first_epoch_ends):
            emit("rows", step=state.step, text=line)
        for line in stragglers.update(state.step, taken.vitals.alone):
            emit("warning", step=state.step, text=line)

        measured, improved = None, False
        last = course.ended(state, recipe)
        if last or course.due(recipe.eval.every, state.step, data):
            measured = hooks.validate(state.step)
            improved = stopping.judge(state, measured, recipe.eval)
            last = last or course.ended(state, recipe)
        share, total, exact = course.progress(state, total_steps, recipe, known_steps)
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
        due = last or improved or course.due(recipe.checkpoint.every, state.step, data)
        if due or first_epoch_ends:
            hooks.record(state, total)
        if due:
            hooks.save(state)
            saved = state.step
        yield
    hooks.sample(state.step, "after")


def next_step(
    steps: Iterator[StepData], state: TrainState, recipe: Recipe, interrupted: bool, engine: Engine
) -> tuple[StepData, float] | None:
    """Return this rank's part of the step after `state.step`, and the seconds that it took.

    None if all ranks are to stop instead.

    Raises:
        TrainingError, DataError: on every rank, if the data of one ends or cannot be used.
    """
    step, problem, data = state.step + 1, None, None
    PULSE.beat("data", step)
    started = time.perf_counter()
    try:
        data = next(steps, None)
    except RaytuneError as error:
        problem = error  # told when the others know as well, who would wait for this rank
    waited = time.perf_counter() - started
    PULSE.beat("start of the step")
    stop = agree(data, interrupted, step, engine.device)
    if problem is not None:
        raise problem
    if data is None:
        raise TrainingError(
            f"step {step}: the data ended in epoch {state.epoch + 1} of {recipe.train.epochs}"
        )
    return None if stop else (data, waited)
