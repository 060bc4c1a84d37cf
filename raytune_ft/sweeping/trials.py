"""Trials: what a sweep knows of each of its runs, and the ledger in which it is written down.

`trials.jsonl` is only ever added to, a line before anything follows from it, so that a driver that
was killed is followed by one that knows the same: which values each trial has, which are over.

    {"event": "planned", "trial": 3, "values": {"train.lr": 0.001}, "time": ...}
    {"event": "started", "trial": 3, "time": ...}            again for each time it is taken up
    {"event": "rung", "trial": 3, "step": 10, "metric": 2.1, "time": ...}   what was compared there
    {"event": "paused", "trial": 3, "step": 10, "metric": 2.1, "time": ...}   the same, of a trial
                                                       that waits behind a checkpoint (population)
    {"event": "exploited", "trial": 3, "step": 10, "from": 1, "values": {"train.lr": 0.0012}, ...}
                                   from there on it has another trial's weights, and these values
    {"event": "done" | "stopped" | "failed", "trial": 3, "metric", "step", "reason", "seconds"}
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytune_ft.training.run_folder import Event

FILE = "trials.jsonl"
FOLDER = "trials"

WAITING, RUNNING, DONE, STOPPED, FAILED = (
    "waiting", "running", "done", "stopped early", "failed: ",
)  # fmt: skip
_ENDS = {"done": DONE, "stopped": STOPPED, "failed": FAILED}


@dataclass(frozen=True)
class Turn:
    """From when on a trial has which values."""

    step: int
    source: int | None
    """Trial with whose weights of that step it went on; None: it is the beginning."""
    values: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as far as it is known."""

    number: int
    name: str
    values: dict[str, Any]
    """Dotted field -> value; the last ones, where they changed on the way."""
    metric: float | None
    """The sweep's metric: of the weights that the trial gives when it is over, the last one seen
    until then, and what it was stopped for if it was."""
    step: int
    state: str
    """`waiting`, `running`, `done`, `stopped early` or `failed: REASON`."""
    folder: Path
    seconds: float
    """That it has run in all."""
    turns: tuple[Turn, ...] = ()
    """All values that it had, where they changed on the way, and since when."""

    @property
    def is_over(self) -> bool:
        """Whether it will not run again."""
        return self.state in (DONE, STOPPED) or self.state.startswith(FAILED)


def name_of(number: int) -> str:
    """Name a trial's folder."""
    return f"trial_{number:04d}"


def ranked(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """Order trials, best first: those that are done, those that go on, then those that failed."""
    sign = 1 if mode == "min" else -1

    def place(trial: Trial) -> tuple[int, float, int]:
        group = 0 if trial.state == DONE else 2 if trial.state.startswith(FAILED) else 1
        known = trial.metric is not None and math.isfinite(trial.metric)
        return group, sign * (trial.metric or 0.0) if known else math.inf, trial.number

    return sorted(trials, key=place)


@dataclass
class Ledger:
    """A sweep's trials by their numbers, and the file that says so.

    Of one driver at a time. `sweep` is the sweep's folder.
    """

    sweep: Path
    trials: dict[int, Trial] = field(default_factory=dict)
    rungs: list[tuple[int, int, float]] = field(default_factory=list)
    """(trial, step, value) of what was compared, in this order."""
    over: list[int] = field(default_factory=list)
    """Numbers of trials in the order in which they ended."""
    exploits: list[tuple[int, Turn]] = field(default_factory=list)
    """Of trials that went on with another one's weights, in this order."""
    carried: int = 0
    """How many of them are carried out for sure: trials have begun since."""
    _is_whole: bool = field(default=False, compare=False)

    @classmethod
    def read(cls, sweep: Path) -> Ledger:
        """Read what is known of a sweep; nothing if it has not begun.

        A last line that a crash cut short never happened.
        """
        ledger = cls(sweep)
        if (sweep / FILE).is_file():
            content = (sweep / FILE).read_bytes()
            for line in content[: content.rfind(b"\n") + 1].splitlines():
                ledger._take(json.loads(line))
        return ledger

    def planned(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Add trials with these values, in this order, behind those that are known."""
        first = len(self.trials)
        self._add(
            *(
                {"event": "planned", "trial": first + i, "values": dict(each)}
                for i, each in enumerate(values)
            )
        )

    def started(self, number: int) -> None:
        """Note that a trial runs, from its beginning or from its last checkpoint."""
        self._add({"event": "started", "trial": number})

    def rung(self, number: int, step: int, value: float) -> None:
        """Note what a trial is compared by."""
        self._add({"event": "rung", "trial": number, "step": step, "metric": value})

    def paused(self, number: int, step: int, value: float) -> None:
        """Note that a trial waits behind a checkpoint, and what it is compared by."""
        self._add({"event": "paused", "trial": number, "step": step, "metric": value})

    def exploited(self, turns: Mapping[int, Turn]) -> None:
        """Note which trials go on with another one's weights; all of a comparison at once."""
        self._add(
            *(
                {
                    "event": "exploited", "trial": number, "step": turn.step, "from": turn.source,
                    "values": turn.values,
                }
                for number, turn in turns.items()
            )
        )  # fmt: skip

    def seen(self, number: int, step: int, value: float | None) -> None:
        """Keep what a running trial says; it is not written down, its own folder has it."""
        trial = self.trials[number]
        if trial.turns and step <= trial.turns[-1].step:
            return  # of before it had these weights
        metric = trial.metric if value is None else value
        self.trials[number] = replace(trial, step=step, metric=metric)

    def ended(
        self,
        event: str,
        number: int,
        *,
        metric: float | None,
        step: int,
        seconds: float = 0.0,
        reason: str | None = None,
    ) -> None:
        """Note that a trial is over.

        Args:
            event: `done`, `stopped` or `failed`.
            number: of the trial.
            metric: of the weights that it gives, or what it was stopped for.
            step: to which `metric` belongs.
            seconds: that it has run in all.
            reason: why it failed, one line.
        """
        said = {} if reason is None else {"reason": reason}
        self._add(
            {
                "event": event, "trial": number, "metric": metric, "step": step, **said,
                "seconds": round(seconds, 3),
            }
        )  # fmt: skip

    def waiting(self) -> Iterator[Trial]:
        """Yield the trials that are not over, in their order."""
        return (self.trials[n] for n in sorted(self.trials) if not self.trials[n].is_over)

    def _add(self, *events: Event) -> None:
        """Write events, in one write that is on the disk before anything follows from them."""
        timed = [{**event, "time": round(time.time(), 3)} for event in events]
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in timed)
        if not self._is_whole:  # by who writes alone: a reader may see a line that is being written
            _cut_half_line(self.sweep / FILE)
            self._is_whole = True
        with (self.sweep / FILE).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        for event in timed:
            self._take(event)

    def _take(self, event: Event) -> None:
        number, kind = int(event["trial"]), event["event"]
        if kind == "planned":
            name = name_of(number)
            folder = self.sweep / FOLDER / name
            self.trials[number] = Trial(
                number, name, event["values"], None, 0, WAITING, folder, 0.0
            )
            return
        trial = self.trials[number]
        if kind == "started":
            self.carried = len(self.exploits)
            self.trials[number] = replace(trial, state=RUNNING)
        elif kind in ("rung", "paused"):
            self.rungs.append((number, event["step"], event["metric"]))
            state = WAITING if kind == "paused" else trial.state
            self.trials[number] = replace(
                trial, step=event["step"], metric=event["metric"], state=state
            )
        elif kind == "exploited":
            self._turn(trial, Turn(event["step"], event["from"], event["values"]))
        elif kind in _ENDS and not trial.is_over:
            self.over.append(number)
            state = _ENDS[kind] + (event.get("reason", "") if kind == "failed" else "")
            self.trials[number] = replace(
                trial, state=state, metric=event["metric"], step=event["step"],
                seconds=event.get("seconds", 0.0),
            )  # fmt: skip

    def _turn(self, trial: Trial, turn: Turn) -> None:
        first = Turn(0, None, trial.values)
        self.exploits.append((trial.number, turn))
        self.trials[trial.number] = replace(
            trial, values=turn.values, turns=(*(trial.turns or (first,)), turn),
            metric=None if turn.source is None else self.trials[turn.source].metric,
        )  # fmt: skip


def _cut_half_line(path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
