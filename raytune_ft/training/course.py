"""Course: how far a run is, which learning rate belongs there, when it is over."""

from __future__ import annotations

from raytune_ft.config.schema import Recipe
from raytune_ft.training.batching import StepData
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.schedule import Moment, expected_steps, in_warmup, share_of


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


def advance(state: TrainState, data: StepData, total_steps: int | None, recipe: Recipe) -> None:
    """Note in the state that the step of `data` was taken."""
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


def due(every: int | str, step: int, data: StepData) -> bool:
    """Tell whether what happens `every` so many steps, or every `epoch`, happens behind a step."""
    return data.ends_epoch if isinstance(every, str) else step % every == 0
