"""On Ray: a sweep's course in, its trials run by Ray Tune; nothing is decided here.

Ray Tune starts trials as resources allow, starts them again where a process was lost, and ends
those that are told to end. Which one is next and who stops says `course`; so what Ray Tune keeps of
a sweep for itself is not needed to go on, and a driver that comes later begins with a new Tuner
over the trials that are left.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.exceptions import RayError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raytune_ft.errors import Interrupted, RaytuneError, TrainingError
from raytune_ft.fitting import POLL_SECONDS, Fit
from raytune_ft.resume import shown
from raytune_ft.screen import Screen
from raytune_ft.sweeping.course import Course, Result
from raytune_ft.sweeping.forecast import Forecast
from raytune_ft.sweeping.one_trial import Orders, run_trial
from raytune_ft.sweeping.trials import Trial, name_of
from raytune_ft.training.guarding.failures import last_line
from raytune_ft.training.run_folder import Event, RunFolder
from raytune_ft.wish import GRACE_S, Wish

FOLDER = "ray"
SAMPLES = 10**9
"""More than there will be: `Next` says when there are no more."""
KILLED = "its process was killed, {times} times; out of memory? see {log}"


class Unkept:
    """What Ray Tune may write down of an object that knows the course: nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing; the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing."""


class Next(Unkept, Searcher):  # type: ignore[misc]
    """Asks the course for the next trial."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def suggest(self, trial_id: str) -> Any:
        trial = self.course.next()
        if trial is None:
            return None if self.course.waits else Searcher.FINISHED
        until = self.course.until(trial.number)
        return {"number": trial.number, "values": json.dumps(trial.values), "until": until}

    def on_trial_complete(
        self, trial_id: str, result: Event | None = None, error: bool = False
    ) -> None:
        """Nothing to do; `Turns` has told the course."""


class Turns(Unkept, FIFOScheduler):  # type: ignore[misc]
    """Tells the course what trials say, and Ray Tune which of them end."""

    def __init__(self, course: Course, show: Callable[[list[Trial]], None]) -> None:
        super().__init__()
        self.course, self.show = course, show

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Event) -> str:
        number, outcome = number_of(trial), result.get("outcome")
        goes_on = True
        if not is_current(trial, self.course):
            return str(self.CONTINUE)
        if outcome == "done":
            self.course.trained(number, Result(result["metric"], result["step"]))
        elif outcome == "paused":
            self.course.paused(number, result["step"], result["metric"])
        elif outcome == "interrupted" and not self.course.stopping:
            self.course.returned(number)
        elif outcome == "failed":
            self.course.failed(number, result["reason"])
        elif outcome is None and result.get("step") is not None:
            goes_on = self.course.told(number, result)
        self.show(self.course.trials)
        return str(self.CONTINUE if goes_on else self.STOP)


class Watch(Unkept, ray_tune.Callback):  # type: ignore[misc]
    """Tells the course of processes that begin and of those that were lost."""

    def __init__(self, course: Course, show: Callable[[list[Trial]], None]) -> None:
        self.course, self.show = course, show

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.course.started(number_of(trial))
        self.show(self.course.trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = number_of(trial)
        if is_current(trial, self.course):
            self.course.failed(number, reason_of(trial, self.course.ledger.trials[number]))
        self.show(self.course.trials)


def is_current(trial: Any, course: Course) -> bool:
    """Tell whether one of Ray Tune's is not behind what is known: lost after its last word."""
    return bool(trial.config["until"] == course.until(number_of(trial)))


def number_of(trial: Any) -> int:
    """Return which of the sweep's trials one of Ray Tune's is."""
    return int(trial.config["number"])


def reason_of(trial: Any, ours: Trial) -> str:
    """Say why a trial was lost: its process ended without a word, more often than it may."""
    text = trial.get_error() or ""
    if "ActorDiedError" in text or "ActorUnavailableError" in text or "OutOfMemory" in text:
        log = RunFolder(ours.folder).log
        return KILLED.format(times=trial.run_metadata.num_failures, log=log)
    return last_line(Exception(text))


def carry_out(
    course: Course,
    orders: Orders,
    plan: Forecast,
    *,
    show: Callable[[list[Trial]], None],
    screen: Screen,
) -> None:
    """Run the trials that are left.

    Args:
        course: of the sweep.
        orders: for every trial.
        plan: how many at once, and what each may use.
        show: is told the trials whenever one changes.
        screen: for lines above them.

    Raises:
        Interrupted: a signal asked for the end; trials wrote their checkpoints.
    """
    folder = RunFolder(orders.job.run_path)
    fit = Fit(_tuner(course, orders, folder.path, plan, show))
    with Wish() as wish:
        while fit.is_alive() and not wish.is_late:
            fit.join(POLL_SECONDS)
            if wish.signal is not None and not course.stopping:
                course.stopping = True
                orders.mailbox.stop.remote()
                screen.line("trials stop behind this step's checkpoint; once more stops at once")
        asked = wish.signal is not None
    if fit.error is not None:
        raise _told(fit.error, folder)
    left = sum(not trial.is_over for trial in course.trials)
    if asked and left:
        late = f" within {GRACE_S:g} s, as far as they came" if fit.is_alive() else ""
        raise Interrupted(
            f"{shown(folder)}: stopped{late}, {len(course.trials) - left} of "
            f"{len(course.trials)} trials are over; go on with: raytune-ft tune --resume "
            f"{shown(folder)}"
        )


def _told(error: BaseException, folder: RunFolder) -> BaseException:
    """Return what is raised for an error of the driver's own, such as a ledger that is full."""
    if isinstance(error, RaytuneError | RayError):
        return error
    traceback.print_exception(error)  # into the sweep's log
    sweep, kind = shown(folder), type(error).__name__
    return TrainingError(
        f"{sweep}: {kind}: {last_line(error)}; see {sweep}/run.log; go on with: raytune-ft tune "
        f"--resume {sweep}"
    )


def _tuner(
    course: Course,
    orders: Orders,
    folder: Path,
    plan: Forecast,
    show: Callable[[list[Trial]], None],
) -> ray_tune.Tuner:
    recipe = course.recipe
    resources = {"cpu": plan.cpus, **({"gpu": plan.gpu_share} if plan.gpu_share else {})}
    return ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(run_trial, orders=orders), resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=Next(course),
            scheduler=Turns(course, show),
            num_samples=SAMPLES,
            max_concurrent_trials=plan.concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            # imports are most of a short trial; on a GPU each begins with memory of its own
            reuse_actors="gpu" not in resources,
        ),
        run_config=ray_tune.RunConfig(
            name=f"attempt_{os.getpid()}",
            storage_path=str(folder / FOLDER),
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=recipe.run.max_failures),
            callbacks=[Watch(course, show)],
        ),
    )


def _name(trial: Any) -> str:
    until = trial.config["until"]
    return name_of(number_of(trial)) + ("" if until is None else f"_{until}")
