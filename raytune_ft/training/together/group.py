"""Group: jobs that differ in their adapters in, a run folder for each out, by one frozen base.

Adapters take the same step one after the other, those that are behind first, so each may begin at
a checkpoint of its own. An adapter ends alone: at its end, when it is given up, or by its own
error; the others do not notice. Without Ray; the caller says where packs come from.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from raytune_ft.config import sharing
from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed
from raytune_ft.errors import DataError, Interrupted, RaytuneError, RecipeError
from raytune_ft.training.ahead import device_of
from raytune_ft.training.batching import steps
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.run_folder import Event
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.together import layout
from raytune_ft.training.together.base import build_engines
from raytune_ft.training.together.member import Member
from raytune_ft.training.together.passes import Passes
from raytune_ft.training.together.steps import SharedSteps
from raytune_ft.training.worker import Job, PackStream, closing


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    state: TrainState
    is_given_up: bool = False
    """Whether `report` ended it."""
    error: RaytuneError | None = None
    """What ended it before its end; `Interrupted` behind a checkpoint of its last step."""

    @property
    def is_done(self) -> bool:
        """Whether its adapter stands in its folder."""
        return self.error is None and not self.is_given_up


class GivenUp(Interrupted):
    """An adapter is not worth its further steps."""


def run_together(
    jobs: Sequence[Job],
    packs: PackStream,
    validation: Callable[[], Iterable[Pack]] | None,
    report: Callable[[int, Event], bool],
    guards: Guards = Guards(),  # noqa: B008, frozen
    *,
    at_once: int | None = None,
) -> list[Outcome]:
    """Train the adapters of several jobs on one base, each to its own end.

    Args:
        jobs: their recipes differ in `sharing.OWN` alone; each has a run folder of its own.
        packs: as `worker.run` takes it; called once.
        validation: held-out packs.
        report: is told the place of a job and each of its events; False ends that job behind the
            step it is at.
        guards: whether this process was asked to stop.
        at_once: adapters that go through the base in one pass; None: as many as fit by the plan.

    Returns:
        What became of each, in the order of the jobs.

    Raises:
        RecipeError: jobs cannot share a base.
        DataError: the rows cannot be used, by any.
    """
    recipes = checked([Recipe.model_validate(job.recipe) for job in jobs])
    device = device_of(jobs[0].sharing)
    folder = Path(jobs[0].model_folder)
    plan = layout.planned(recipes, folder, device, jobs[0].gpu_share, at_once)
    engines, passes = build_engines(
        plan.recipes, folder, device, plan.at_once, resident=plan.resident
    )
    group = Group(passes)
    for place, (job, recipe) in enumerate(zip(jobs, plan.recipes, strict=True)):
        told = partial(report, place)
        group.members[place] = Member(job, recipe, engines[place], validation, told, guards)
    engines.clear()  # who leaves the group takes its memory along
    return group.run(packs)


def checked(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return recipes that can share a base; RecipeError says in one line why others cannot."""
    for recipe in recipes:
        found = sharing.refusal(recipe)
        if found is not None:
            raise RecipeError(found)
        if (field := sharing.difference(recipes[0], recipe)) is not None:
            raise RecipeError(f"{field}: has several values: these trials cannot share a base")
    return list(recipes)


class Group:
    """The members that are still on their way."""

    def __init__(self, passes: Passes) -> None:
        self.members: dict[int, Member] = {}
        self.passes = passes
        self.outcomes: dict[int, Outcome] = {}
        self.source: SharedSteps | None = None

    def run(self, packs: PackStream) -> list[Outcome]:
        """See all of them to their ends; one outcome for each."""
        places = list(self.members)
        for place in places:
            self._go_on(place)
        if self.members:
            self._train(packs)
        return [self.outcomes[place] for place in places]

    def _train(self, packs: PackStream) -> None:
        with closing(packs(self._begin())) as stream:
            self._share(stream)
            while self.members:
                self._round()

    def _begin(self) -> Position:
        """Return the place of the member that is behind all others."""
        states = [member.state for member in self.members.values()]
        behind = min(states, key=lambda state: state.step)
        return Position(behind.epoch, behind.window, behind.pack)

    def _share(self, stream: Iterator[Placed]) -> None:
        begins = {place: member.state.step for place, member in self.members.items()}
        sizes = next(iter(self.members.values())).recipe.train
        self.source = SharedSteps(steps(stream, sizes, rank=0, workers=1), begins)
        for place, member in self.members.items():
            member.steps = self.source.of(place)

    def _round(self) -> None:
        """Let those that are behind all others take a step."""
        step = min(member.state.step for member in self.members.values())
        places = [p for p, member in self.members.items() if member.state.step == step]
        self.passes.begin([self.members[p].engine for p in places if not self.members[p].has_ended])
        for place in places:
            self._go_on(place)

    def _go_on(self, place: int) -> None:
        member = self.members[place]
        self.passes.seats.sit(member.engine.number)
        try:
            going = member.go_on()
            if going and member.has_ended and self.source is not None:
                going = member.go_on()  # samples, the export
            if going and member.is_given_up:
                member.give_up(GivenUp(f"given up at step {member.state.step}"))
        except GivenUp:
            self._leave(place, Outcome(member.state, is_given_up=True))
        except DataError:
            raise
        except RaytuneError as error:
            self._leave(place, Outcome(member.state, error=error.with_traceback(None)))
        else:
            if not going:
                self._leave(place, Outcome(member.state))

    def _leave(self, place: int, outcome: Outcome) -> None:
        """Note what became of a member, and let go of its memory."""
        member = self.members.pop(place)
        self.outcomes[place] = outcome
        self.passes.leave(member.engine)
        self.passes.seats.remove(member.engine.number)
        if self.source is not None:
            self.source.leave(place)
        device = member.engine.device
        del member
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
