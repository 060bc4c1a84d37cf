"""Guards: what watches over one rank's training, put around the loop's hooks.

Interruption, the disk before every save, the watchdog, and the patience that ranks have where only
some of them work. `starting` watches over a rank from the moment it meets the others, `guarded`
over its steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, TrainingError
from raytune_ft.training import course
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.guarding import disk, failures, memory_end
from raytune_ft.training.guarding.failures import Elsewhere, Grow
from raytune_ft.training.guarding.pulse import PULSE, listen, loading
from raytune_ft.training.guarding.watchdog import (
    FOLDER,
    LOADING_S,
    MARGIN_S,
    PATIENCE_S,
    Place,
    Watchdog,
    host,
    left_behind,
    patience,
    set_timeouts,
)  # fmt: skip
from raytune_ft.training.loop import Hooks
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.vitals import exchange

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Guards:
    """What the caller of a rank's training can tell and wants, and who watches over the rank."""

    interrupted: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop."""
    wanting: Callable[[], bool] = lambda: False
    """Whether all are to end behind a checkpoint, since more of them could go on from it."""
    watched: bool = False
    """Whether a hang ends this process; somebody has to start it again."""
    watchdog: Watchdog | None = None
    """Of this rank, once it has started."""


@contextmanager
def starting(
    guards: Guards, folder: RunFolder, device: torch.device, limit_s: float = LOADING_S
) -> Iterator[Guards]:
    """Watch over a rank while it loads; yield the guards that know its watchdog.

    All ranks have to call it. Signs of life are the weights that are made and what is read from
    files; the limit is long, since some of what libraries do at a start gives neither.

    Raises:
        TrainingError: memory ran out at the same step twice, and processes were killed for it.
    """
    if not guards.watched:
        yield guards
        return
    if rank() == 0:
        _see_who_was_killed(folder)
    PULSE.attempt = int(exchange(torch.tensor([time.time_ns()]), device)[0][0])

    def hung(line: str, step: int) -> None:
        PULSE.step = step
        failures.note(folder, line, rank=rank(), kind=failures.HANG)

    place = Place(folder.path / FOLDER, rank(), world_size(), PULSE.attempt)
    with loading(), Watchdog(place, PULSE, limit_s, hung) as watchdog:
        yield replace(guards, watchdog=watchdog)


@contextmanager
def guarded(
    guards: Guards, hooks: Hooks, engine: Engine, recipe: Recipe, folder: RunFolder
) -> Iterator[Hooks]:
    """Watch over training while the block runs; yield the hooks to train with."""
    save = functools.partial(_save, hooks.save, engine, recipe, folder, guards.wanting)
    hooks = replace(hooks, interrupted=guards.interrupted, save=save)
    with ExitStack() as stack:
        if guards.watchdog is not None:
            limit = recipe.run.collective_timeout
            _watch_steps(stack, guards.watchdog, limit, engine)
            patient = functools.partial(_patiently, engine.device, limit)
            hooks = replace(
                hooks, sample=patient(hooks.sample), validate=patient(hooks.validate),
                benchmark=patient(hooks.benchmark), save=patient(hooks.save),
            )  # fmt: skip
        yield hooks


def _watch_steps(stack: ExitStack, watchdog: Watchdog, limit_s: float, engine: Engine) -> None:
    """Until the stack unwinds, wait for the others no longer than `limit_s`; nobody watches then.

    Ranks meet here first: one that still loads may take longer than a step does.
    """
    exchange(torch.zeros(1, dtype=torch.int64), engine.device)
    listen(engine.module, engine.trained.values())
    watchdog.expect(limit_s)
    stack.callback(watchdog.stop)
    set_timeouts(limit_s + MARGIN_S)
    stack.callback(set_timeouts, PATIENCE_S)


def _see_who_was_killed(folder: RunFolder) -> None:
    """Note it where the last start left pulses and no word: its processes were killed."""
    found = left_behind(folder.path / FOLDER)
    if found is None:
        return
    said = failures.last(folder)
    if said is not None and said["attempt"] == found["attempt"]:
        return
    PULSE.step, PULSE.attempt = found["step"], found["attempt"]
    words = f"killed at step {found['step']}"
    if found["host"] != host() or not memory_end.suspected(found["memory"], memory_end.kills()):
        failures.mention(folder, words)
        return
    words = f"killed (out of memory?) at step {found['step']}"
    again = f"{words} twice; see `dmesg`, and give it more memory or a smaller data.max_length"
    if failures.note(folder, words, rank=0, kind=failures.KILLED, again=again):
        raise TrainingError(again)


def _patiently(device: torch.device, limit_s: float, hook: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(hook)
    def patient(*args: P.args, **kwargs: P.kwargs) -> R:
        PULSE.beat(getattr(hook, "__name__", "save"))
        with patience(device, limit_s):
            return hook(*args, **kwargs)

    return patient


def _save(
    save: Callable[[TrainState], None],
    engine: Engine,
    recipe: Recipe,
    folder: RunFolder,
    wanting: Callable[[], bool],
    state: TrainState,
) -> None:
    """Save if there is room for it; if not, every rank knows before any begins.

    Raises:
        Grow: on every rank, behind the save, where any of them is told to make room for more.
    """
    problem = None
    if rank() == 0:
        try:
            disk.check_save(folder.checkpoints, engine.shapes, recipe.train.optimizer)
        except CheckpointError as error:
            problem = error
    known = torch.tensor([problem is not None, wanting()], dtype=torch.int64)
    (short, *_), *_ = table = exchange(known, engine.device)
    if problem is not None:
        raise problem
    if short:
        raise Elsewhere(f"step {state.step}: no room for a checkpoint")
    save(state)
    if any(more for _, more in table) and not course.ended(state, recipe):
        raise Grow(f"step {state.step}: there is room for more workers")
