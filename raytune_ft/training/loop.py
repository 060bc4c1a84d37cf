"""The training loop, one page: rare events first, the optimizer step last."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import TrainingError
from raytune_ft.training.batching import StepData
from raytune_ft.training.checkpoint import TrainState
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.schedule import lr_at


class Emit(Protocol):
    """Record one event of a run; only rank 0's goes anywhere."""

    def __call__(self, kind: str, **fields: object) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What happens between optimizer steps. Every rank calls each hook at the same step."""

    sample: Callable[[int, str], None]
    """(step, when) -> answers to the recipe's prompts."""
    validate: Callable[[int], float | None]
    """step -> loss on the held-out rows, if there are any."""
    benchmark: Callable[[int], None]
    """step -> answers to the recipe's MMLU questions."""
    save: Callable[[TrainState], None]


def train(
    engine: Engine,
    recipe: Recipe,
    steps: Iterator[StepData],
    state: TrainState,
    total_steps: int,
    hooks: Hooks,
    emit: Emit,
) -> TrainState:
    """Run from `state` to `total_steps` optimizer steps.

    Args:
        steps: this rank's data, from `state`'s position on.
        state: changed in place and returned.
        total_steps: of the whole run, not only of what is left.

    Raises:
        TrainingError: the loss or gradient is not finite, or a step has no labelled token.
    """
    seed_step(recipe.train.seed, state.step)
    if state.step == 0:
        hooks.sample(0, "before")
    while state.step < total_steps:
        started = time.perf_counter()
        data = next(steps, None)
        if data is None:
            raise TrainingError(
                f"step {state.step + 1}: the data ended before step {total_steps}; "
                "the source files changed since they were counted"
            )
        waited = time.perf_counter() - started
        step = state.step + 1
        if data.n_targets == 0:
            raise TrainingError(f"step {step}: no token of rows {data.row_ids[:5]} is trained")

        seed_step(recipe.train.seed, step)
        engine.module.train()
        loss_sum = torch.zeros((), device=engine.device)
        for batch in data.micro_batches:
            loss_sum += engine.forward_backward(batch, data.n_targets)
        loss = _sum_over_ranks(loss_sum) / data.n_targets
        _stop_unless_finite("loss", loss, step, data)  # before the optimizer touches the weights
        lr = lr_at(state.step, total_steps, recipe.train)
        grad_norm = engine.step(lr)
        _stop_unless_finite("gradient norm", grad_norm, step, data)

        seconds = time.perf_counter() - started
        _advance(state, data)
        last = state.step == total_steps
        val_loss = hooks.validate(state.step) if last or _epoch_ends(data) else None
        emit(
            "step", step=state.step, epoch=data.epoch, loss=loss, val_loss=val_loss, lr=lr,
            grad_norm=grad_norm, tokens=data.n_tokens, targets=data.n_targets, seconds=seconds,
            tokens_per_s=data.n_tokens / seconds, data_seconds=waited, rows=data.row_ids,
            memory_gib=memory_gib(engine.device),
        )  # fmt: skip
        every = recipe.chat_eval.every
        if every and state.step % every == 0 and not last:
            hooks.sample(state.step, "step")
        if last or _epoch_ends(data):
            hooks.benchmark(state.step)
        if last or _due(recipe.checkpoint.every, state.step, data):
            hooks.save(state)
    hooks.sample(state.step, "after")
    return state


def seed_step(seed: int, step: int) -> None:
    """Seed torch from the step's number: dropout needs no state to go on exactly."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank())


def _advance(state: TrainState, data: StepData) -> None:
    state.step += 1
    state.epoch, state.window, state.pack = (
        data.position.epoch, data.position.window, data.position.pack,
    )  # fmt: skip
    state.tokens += data.n_tokens
    state.targets += data.n_targets


def _epoch_ends(data: StepData) -> bool:
    return data.position.epoch > data.epoch


def _due(every: int | str, step: int, data: StepData) -> bool:
    return _epoch_ends(data) if isinstance(every, str) else step % every == 0


def _sum_over_ranks(value: torch.Tensor) -> float:
    if world_size() > 1:
        dist.all_reduce(value)
    return float(value)


def _stop_unless_finite(what: str, value: float, step: int, data: StepData) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: {what} is {value} on rows {data.row_ids[:5]}; "
            "lower train.lr or look at these rows; the last checkpoint is unharmed"
        )


def memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
