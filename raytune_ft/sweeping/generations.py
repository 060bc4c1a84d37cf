"""Generations: a population's course; trials pause at comparisons, and some go on as others do.

Between two comparisons each trial is a process that ends behind a checkpoint, so that a population
may be larger than what there is room for at once. When all are there it is decided who goes on with
whose weights (`population`), that is written into the ledger, carried out, and only then anything
begins. A driver that is killed in between leaves the lines for the next one, which carries out
again: the weights that are taken stand until their own trial goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping import population
from raytune_ft.sweeping.course import Course
from raytune_ft.sweeping.inheriting import inherit
from raytune_ft.sweeping.searching import Search
from raytune_ft.sweeping.space import Space
from raytune_ft.sweeping.trials import Ledger, Trial, Turn

Carry = Callable[[Trial, Trial, Turn], None]
"""(trial, trial that it takes from, turn) -> done on the disk, whole or not at all, or again."""


def course_of(recipe: Recipe, ledger: Ledger, search: Search, total_steps: int) -> Course:
    """Return the course of a sweep, as `tune.scheduler` has it."""
    kind = Generations if recipe.tune.scheduler == "pbt" else Course
    return kind(recipe, ledger, search, total_steps)


class Generations(Course):
    """The course of a population.

    Args:
        recipe, ledger, search, total_steps: as of any course.
        carry: gives a trial another one's weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        ledger: Ledger,
        search: Search,
        total_steps: int,
        *,
        carry: Carry = inherit,
    ) -> None:
        self.rungs = population.rungs_of(total_steps)
        self.carry = carry
        self._met = Counter(number for number, _, _ in ledger.rungs)
        # the last one that any trial came to is gone through once more: it may be half done
        self._compared = max(0, max(self._met.values(), default=0) - 1)
        self._is_open = False
        super().__init__(recipe, ledger, search, total_steps)
        self._is_open = True
        self._settle()

    @property
    def waits(self) -> bool:
        return not self.stopping and any(True for _ in self.ledger.waiting())

    def until(self, number: int) -> int | None:
        last = max((step for n, step, _ in self.ledger.rungs if n == number), default=0)
        return next((rung for rung in self.rungs if rung > last), None)

    def paused(self, number: int, step: int, value: float) -> None:
        """Note that a trial paused behind a step's checkpoint; said again it changes nothing."""
        until = self.until(number)
        if until is None or step < until or self.ledger.trials[number].is_over:
            return
        self.ledger.paused(number, step, value)
        self._met[number] += 1
        self._given.discard(number)
        self._settle()

    def returned(self, number: int) -> None:
        self._given.discard(number)

    def _is_given(self, trial: Trial) -> bool:
        """Tell whether a trial runs, or waits for others that are to be compared with it."""
        return super()._is_given(trial) or self._met[trial.number] > self._compared

    def _settle(self) -> None:
        super()._settle()
        left = [trial.number for trial in self.ledger.waiting()]
        if self._is_open and left and all(self._met[n] > self._compared for n in left):
            self._compare()
            self._compared += 1

    def _compare(self) -> None:
        """Decide who goes on with whose weights, write it down, and carry it out."""
        step, values = self._there()
        known = {number for number, turn in self.ledger.exploits if turn.step == step}
        section, key = self.recipe.tune, f"{self.recipe.train.seed}/{step}"
        space, turns = Space.of(self.recipe), {}
        for number, source in population.exploits(values, section.mode, key).items():
            if number not in known:
                own = self.ledger.trials[source].values
                own = population.moved(space, self.recipe, own, f"{key}/{number}")
                turns[number] = Turn(step, source, own)
        if turns:
            self.ledger.exploited(turns)
        for number, turn in self.ledger.exploits[self.ledger.carried :]:
            assert turn.source is not None  # noqa: S101, for mypy
            self.carry(self.ledger.trials[number], self.ledger.trials[turn.source], turn)

    def _there(self) -> tuple[int, dict[int, float]]:
        """Return the step of the comparison that all have come to, and each trial's value."""
        seen: Counter[int] = Counter()
        values, last = {}, 0
        for number, step, value in self.ledger.rungs:
            if seen[number] == self._compared:
                values[number], last = value, max(last, step)
            seen[number] += 1
        return last, values
