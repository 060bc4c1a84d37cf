"""Course: what trials say in, who runs next and who stops out; every turn stands in the ledger.

No Ray: `on_ray` asks and tells, and so may a test or a group of adapters in one process. Made anew
of a ledger and the trials' folders it goes on as if there had been no other driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.sweeping.halving import Halving, rungs_of
from raytune_ft.sweeping.searching import Search
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import Ledger, Trial
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl

REASON_LENGTH = 300


@dataclass(frozen=True)
class Result:
    """What a trial gives that trained to its end."""

    metric: float | None
    """Of the weights that it exported."""
    step: int
    """To which they belong."""


@dataclass(frozen=True)
class _End:
    event: str
    result: Result
    reason: str | None = None


class Course:
    """The course of one sweep.

    Args:
        recipe: of the sweep.
        ledger: what is known; it is added to.
        search: where values come from.
        total_steps: of a trial, as far as it can be told, of which rungs are made.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger, search: Search, total_steps: int) -> None:
        self.recipe, self.ledger, self.search = recipe, ledger, search
        section = recipe.tune
        rungs = rungs_of(total_steps) if section.scheduler == "asha" else []
        self.halving = Halving(rungs, section.mode)
        self.stopping = False
        """Set from any thread: no further trial begins."""
        self._given: set[int] = set()
        self._ending: dict[int, _End] = {}
        """Trials that will say nothing more, while a rung of them is open."""
        self._seconds: dict[int, dict[int, float]] = {}
        missing = search.planned()[len(ledger.trials) :]
        if missing:
            ledger.planned(missing)
        for number, step, value in ledger.rungs:
            self.halving.on_value(number, step, value)
        for number in ledger.over:
            self.halving.on_end(number)
        for trial in list(ledger.waiting()):
            if self._can_be(trial):
                self._take_up(trial)

    @property
    def trials(self) -> list[Trial]:
        """All trials, by their numbers."""
        return [self.ledger.trials[number] for number in sorted(self.ledger.trials)]

    def next(self) -> Trial | None:
        """Return a trial to run, a recipe being possible with its values; None if none is left."""
        while not self.stopping:
            trial = next((t for t in self.ledger.waiting() if not self._is_given(t)), None)
            if trial is None:
                values = self.search.next(self.ledger)
                if values is None:
                    return None
                self.ledger.planned([values])
                continue
            if self._can_be(trial):
                self._given.add(trial.number)
                return trial
        return None

    @property
    def waits(self) -> bool:
        """Whether `next` will have trials later, though it has none now."""
        return False

    def until(self, number: int) -> int | None:
        """Return the step behind whose measurement a trial has to pause; None: it trains on."""
        return None

    def started(self, number: int) -> None:
        """Note that a trial's process begins, or begins again."""
        self.ledger.started(number)

    def paused(self, number: int, step: int, value: float) -> None:
        """Note that a trial paused behind a step's checkpoint, as `until` asks for."""
        raise NotImplementedError

    def returned(self, number: int) -> None:
        """Note that a trial's process ended on the way, for no fault of the trial."""

    def told(self, number: int, event: Event) -> bool:
        """Take a step of a trial; return whether it goes on.

        Args:
            number: of the trial.
            event: of its metrics: `step`, `seconds`, and the sweep's metric where there is one.
        """
        trial = self.ledger.trials[number]
        if trial.is_over:
            return False
        step, value = int(event["step"]), event.get(self.recipe.tune.metric)
        self._seconds.setdefault(number, {})[step] = float(event.get("seconds") or 0.0)
        if value is not None:
            if self.halving.unmet(number, step):
                self.ledger.rung(number, step, value)
                self.halving.on_value(number, step, value)
            self.ledger.seen(number, step, value)
            self._settle()
        else:
            self.ledger.seen(number, step, None)
        return not self.ledger.trials[number].is_over

    def trained(self, number: int, result: Result) -> None:
        """Note that a trial has trained to its end; it is over when no rung of it is open."""
        self._says_no_more(number, _End("done", result))

    def failed(self, number: int, reason: str) -> None:
        """Note that a trial cannot be trained; the others go on."""
        trial = self.ledger.trials[number]
        words = " ".join(reason.split())[:REASON_LENGTH]
        self._says_no_more(number, _End("failed", Result(trial.metric, trial.step), words))

    def _says_no_more(self, number: int, end: _End) -> None:
        if not self.ledger.trials[number].is_over:
            self._ending[number] = end
            self.halving.on_end(number)
            self._settle()

    def _can_be(self, trial: Trial) -> bool:
        """Fail a trial whose values do not go together."""
        try:
            with_values(self.recipe, trial.values)
        except RecipeError as error:
            self.failed(trial.number, str(error))
            return False
        return True

    def _is_given(self, trial: Trial) -> bool:
        return trial.number in self._given or trial.number in self._ending

    def _settle(self) -> None:
        """End the trials of which it is known by now that they are over."""
        changed = True
        while changed:
            changed = False
            for trial in list(self.ledger.waiting()):
                number = trial.number
                stopped = self.halving.stopped_at(number)
                if stopped is not None:
                    step, value = stopped
                    self._ending.pop(number, None)
                    self._end(number, _End("stopped", Result(value, step)))
                    self.halving.on_end(number)
                elif number in self._ending and self.halving.is_settled(number):
                    self._end(number, self._ending.pop(number))
                else:
                    continue
                changed = True

    def _end(self, number: int, end: _End) -> None:
        self.ledger.ended(
            end.event, number, metric=end.result.metric, step=end.result.step,
            seconds=self._time_of(number), reason=end.reason,
        )  # fmt: skip

    def _time_of(self, number: int) -> float:
        return sum(self._seconds.get(number, {}).values())

    def _take_up(self, trial: Trial) -> None:
        """Learn from a trial's folder what the driver before had not written down yet."""
        folder = RunFolder(trial.folder)
        if not folder.run_json.is_file():
            return
        for event in read_jsonl(folder.metrics):
            if not self.told(trial.number, event):
                return
        if is_trained(folder):
            self.trained(trial.number, result_of(folder, self.recipe.tune.metric))


def is_trained(folder: RunFolder) -> bool:
    """Tell whether a trial has trained to its end."""
    try:
        said = folder.info().get("status")
    except CheckpointError:
        return False
    return said == "done" and (folder.adapter.is_dir() or folder.model.is_dir())


def result_of(folder: RunFolder, metric: str) -> Result:
    """Read what a finished trial gives: the metric of the weights that it exported.

    With `eval.export: best` those are not the last ones. A metric that is not measured in every
    step is the last one measured up to there.
    """
    events = list(read_jsonl(folder.metrics))
    last = max((int(event["step"]) for event in events), default=0)
    step = int(folder.info().get("exported_step") or last)
    known = [e[metric] for e in events if e["step"] <= step and e.get(metric) is not None]
    return Result(known[-1] if known else None, step)


def keep_states(trials: Sequence[Trial]) -> None:
    """Write into the records of trials that are over and gave nothing why that is so."""
    for trial in trials:
        folder = RunFolder(trial.folder)
        if trial.is_over and folder.run_json.is_file() and not is_trained(folder):
            folder.update(status=trial.state)
