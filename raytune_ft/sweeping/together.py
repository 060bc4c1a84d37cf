"""Together: trials of a sweep in, groups that train on one frozen base each, their run folders out.

`on_ray` gives every trial a process and a base of its own. Here a process has as many trials as can
share its base (`config.sharing`); one that cannot stands alone. The course decides as there: at a
rung a trial waits for the word, in the order of numbers, so it is the same trials that go on.
"""

from __future__ import annotations

import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raytune_ft.cluster import noise_to
from raytune_ft.config import sharing
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import Interrupted, RaytuneError
from raytune_ft.fitting import asked_by
from raytune_ft.resume import shown
from raytune_ft.screen import Screen
from raytune_ft.sweeping import carried
from raytune_ft.sweeping.carried import Place
from raytune_ft.sweeping.course import Course, Result, is_trained, result_of
from raytune_ft.sweeping.desk import Desk
from raytune_ft.sweeping.forecast import CPUS
from raytune_ft.sweeping.on_ray import KILLED
from raytune_ft.sweeping.one_trial import SHOWN, Orders, begin_folder, fed, job_of, recipe_of
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import Trial
from raytune_ft.training import worker
from raytune_ft.training.guarding.failures import last_line
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.guarding.interruption import AskedToEnd
from raytune_ft.training.run_folder import Event, RunFolder
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.together import GivenUp, Outcome, run_together
from raytune_ft.training.worker import Job
from raytune_ft.wish import Wish

LARGEST = 8
"""Trials on one base: more are the next group's, which learns from what became of these."""
POLL_S = 0.05


def can_share(recipe: Recipe, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Part trials into groups that can be trained on one base, each in the order of numbers.

    Args:
        recipe: of the sweep.
        trials: whose values go together, with the recipe's.
    """
    groups: list[tuple[Recipe, list[Trial]]] = []
    for trial in sorted(trials, key=lambda one: one.number):
        own = with_values(recipe, trial.values)
        fitting = (
            group for known, group in groups
            if len(group) < LARGEST and sharing.refusal(own) is None
            and sharing.difference(known, own) is None
        )  # fmt: skip
        group = next(fitting, None)
        if group is None:
            groups.append((own, [trial]))
        else:
            group.append(trial)
    return [group for _, group in groups]


def run_group(
    group: Sequence[Trial], orders: Orders, desk: Any, rungs: Sequence[int]
) -> list[Event]:
    """Train a group in this process; return for each trial what became of it.

    Args:
        group: of `can_share`.
        orders: as every trial of the sweep has them.
        desk: is told each step, and knows which trials are over.
        rungs: steps at which the word of the driver is waited for.
    """
    asked = Recipe.model_validate(orders.job.recipe)
    metric, keep = asked.tune.metric, asked.checkpoint.keep
    with ExitStack() as stack:
        places = {
            trial.number: stack.enter_context(carried.at_hand(orders.way, trial.name, keep))
            for trial in group
        }
        left = [trial for trial in group if not is_trained(places[trial.number].folder)]
        said: dict[int, Event] = {}
        if left:
            teller = Teller(desk, left, rungs, metric)
            for number, outcome in _outcomes(left, places, asked, orders, teller).items():
                said[number] = _noted(outcome, places[number].folder, metric)
        for number in places.keys() - said.keys():
            said[number] = _done(places[number].folder, metric)
    return [said[trial.number] for trial in group]  # behind what was carried home


def _outcomes(
    left: Sequence[Trial],
    places: Mapping[int, Place],
    asked: Recipe,
    orders: Orders,
    teller: Teller,
) -> dict[int, Outcome]:
    """Train; return what became of each trial by its number."""
    with noise_to(places[left[0].number].folder.log):
        try:
            outcomes = _trained(left, places, asked, orders, teller)
        except Exception:
            traceback.print_exc()  # into the log of the group's first trial
            raise
    return {trial.number: outcome for trial, outcome in zip(left, outcomes, strict=True)}


@dataclass
class Teller:
    """Tells the desk what trials say, and asks it at rungs."""

    desk: Any
    trials: Sequence[Trial]
    rungs: Sequence[int]
    metric: str
    _met: Counter[int] = field(default_factory=Counter)

    def __call__(self, place: int, event: Event) -> bool:
        """Tell an event of a trial, by its place; return whether the trial goes on."""
        if event["kind"] != "step":
            return True
        met = sum(rung <= event["step"] for rung in self.rungs)
        waits = event.get(self.metric) is not None and met > self._met[place]
        if waits:
            self._met[place] = met
        said = {key: event.get(key) for key in (*SHOWN, self.metric)}
        number = self.trials[place].number
        goes_on: bool = ray.get(self.desk.tell.remote(number, said, waits=waits))
        return goes_on


def _trained(
    trials: Sequence[Trial],
    places: Mapping[int, Place],
    asked: Recipe,
    orders: Orders,
    tell: Teller,
) -> list[Outcome]:
    """Train trials to their ends, on one base if they can share it."""
    recipes = [recipe_of(asked, trial.values, orders.home_of(trial.name)) for trial in trials]
    first, *others = (places[trial.number] for trial in trials)
    with (
        fed(recipes[0], orders, first) as (job, supply),
        AskedToEnd() as killed,
        asked_by(orders.mailbox) as stopping,
    ):
        # rows that are no other trial's were counted for the first of the group
        counted = first.sweep if orders.supply is not None else first.folder
        jobs = [first.located(job)]
        for recipe, place in zip(recipes[1:], others, strict=True):
            begin_folder(recipe, counted, place.folder)
            jobs.append(place.located(job_of(job, recipe, counted, place.folder)))
        packs, validation = supply.of_rank(0)
        guards = Guards(interrupted=lambda: killed() or stopping())
        if sharing.refusal(recipes[0]) is None:
            return run_together(jobs, packs, validation, tell, guards)
        return [_alone(jobs[0], packs, validation, tell, guards)]


def _alone(job: Job, packs: Any, validation: Any, tell: Teller, guards: Guards) -> Outcome:
    """Train a trial that needs a base of its own."""

    def show(event: Event) -> None:
        if not tell(0, event):
            raise GivenUp(f"given up at step {event['step']}")

    try:
        return Outcome(worker.run(job, packs, validation, show, guards))
    except GivenUp:
        return Outcome(TrainState(), is_given_up=True)
    except RaytuneError as error:
        return Outcome(TrainState(), error=error)


def _noted(outcome: Outcome, folder: RunFolder, metric: str) -> Event:
    """Write into a trial's record how it ended; return that."""
    if outcome.is_given_up:
        return {"outcome": "stopped"}
    if isinstance(outcome.error, Interrupted):
        folder.update(status="stopped")
        return {"outcome": "interrupted"}
    if outcome.error is not None:
        folder.update(status="failed")
        return {"outcome": "failed", "reason": str(outcome.error)}
    folder.update(status="done")
    return _done(folder, metric)


def _done(folder: RunFolder, metric: str) -> Event:
    result = result_of(folder, metric)
    return {"outcome": "done", "metric": result.metric, "step": result.step}


def carry_out(
    course: Course, orders: Orders, *, show: Callable[[list[Trial]], None], screen: Screen
) -> None:
    """Run the trials that are left, in groups: one after the other, or one on each GPU.

    Args:
        course: of the sweep.
        orders: for every trial; how many share a machine or a GPU is decided here.
        show: is told the trials whenever some changed.
        screen: for lines above them.

    Raises:
        Interrupted: a signal asked for the end; trials wrote their checkpoints.
    """
    groups = Groups(course, orders)
    with Wish() as wish:
        while groups.go_on():
            if groups.has_news:
                show(course.trials)
            if wish.signal is not None and not course.stopping:
                course.stopping = True
                orders.mailbox.stop.remote()
                screen.line("trials stop behind this step's checkpoint; once more stops at once")
            if wish.is_late:
                break
        asked = wish.signal is not None
    show(course.trials)
    left = sum(not trial.is_over for trial in course.trials)
    if asked and left:
        folder = shown(RunFolder(orders.job.run_path))
        raise Interrupted(
            f"{folder}: stopped, {len(course.trials) - left} of {len(course.trials)} trials are "
            f"over; go on with: raytune-ft tune --resume {folder}"
        )


class Groups:
    """The groups of a sweep that run, and those that wait."""

    def __init__(self, course: Course, orders: Orders) -> None:
        self.course = course
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.processes = max(1, gpus)
        job = replace(orders.job, sharing=self.processes, gpu_share=1.0)
        self.orders = replace(orders, job=job)
        self.desk = ray.remote(num_cpus=0)(Desk).remote()
        # a process of its own, which gives all memory back at its end
        self._task = ray.remote(num_cpus=CPUS, num_gpus=min(1, gpus), max_calls=1, max_retries=0)(
            run_group
        )
        self._waiting: deque[list[Trial]] = deque()
        self._running: dict[Any, list[Trial]] = {}
        self._losses: Counter[int] = Counter()
        self.has_news = False
        """Whether anything changed in the last turn."""

    def go_on(self) -> bool:
        """Begin what there is room for and hear what was said since; False when all is over."""
        while len(self._running) < self.processes and (group := self._next()):
            for trial in group:
                self.course.started(trial.number)
            rungs = self.course.halving.rungs
            ref = self._task.remote(group, self.orders, self.desk, rungs)
            self._running[ref] = group
        if not self._running:
            return False
        ended, _ = ray.wait(list(self._running), timeout=POLL_S)
        self.has_news = self._hear() > 0 or bool(ended)
        for ref in ended:
            self._end(ref, self._running.pop(ref))
        return True

    def _next(self) -> list[Trial] | None:
        """Return a group to run; None if none is left."""
        if not self._waiting and not self.course.stopping:
            found: list[Trial] = []
            while len(found) < LARGEST and (trial := self.course.next()):
                found.append(trial)
            self._waiting.extend(can_share(self.course.recipe, found))
        return self._waiting.popleft() if self._waiting else None

    def _hear(self) -> int:
        """Take what trials said to the course; return how much that was."""
        events = ray.get(self.desk.take.remote())
        for number, event in events:
            self.course.told(number, event)
        over = [trial.number for trial in self.course.trials if trial.is_over]
        self.desk.answer.remote(len(events), over)
        return len(events)

    def _end(self, ref: Any, group: list[Trial]) -> None:
        try:
            outcomes = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, RaytuneError) else error
            for trial in group:
                self.course.failed(trial.number, last_line(cause))
            return
        except RayError:
            self._lost(group)
            return
        for trial, said in zip(group, outcomes, strict=True):
            if said["outcome"] == "done":
                self.course.trained(trial.number, Result(said["metric"], said["step"]))
            elif said["outcome"] == "failed":
                self.course.failed(trial.number, said["reason"])

    def _lost(self, group: list[Trial]) -> None:
        """Begin the trials of a lost process again, in halves: the one that ends it gets alone."""
        left = []
        for trial in group:
            if self.course.ledger.trials[trial.number].is_over:
                continue
            self._losses[trial.number] += 1
            if self._losses[trial.number] > self.course.recipe.run.max_failures:
                log = RunFolder(group[0].folder).log
                times = self._losses[trial.number]
                self.course.failed(trial.number, KILLED.format(times=times, log=log))
            else:
                left.append(trial)
        half = (len(left) + 1) // 2
        self._waiting.extendleft(part for part in (left[half:], left[:half]) if part)
