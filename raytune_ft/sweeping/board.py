"""Board: a sweep's trials in, a leaderboard on the terminal, and lines where there is none.

Best first, as `trials.ranked` orders them. On a terminal one table is drawn over and over; where
output is piped each change is a line. Either way the whole table stands at the end.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raytune_ft.config.schema import TuneSection
from raytune_ft.screen import Screen
from raytune_ft.sweeping.lineage import lines_of, turns_of
from raytune_ft.sweeping.trials import DONE, FAILED, RUNNING, STOPPED, WAITING, Trial, ranked
from raytune_ft.sweeping.words import assignments, figure, short_field, short_value
from raytune_ft.training.watching.reporting import clock
from raytune_ft.training.watching.reporting.series import number

FILE = "leaderboard.jsonl"
SHORTEST = 9
"""Characters of a field's name that are shown, however short its values are."""
ENOUGH = 0.1
"""Share of the steps to come that is taken before the end is told."""
REASONS = 3
"""Of failed trials that are shown while a sweep goes on."""
TAIL = 2**16
"""Bytes at the end of metrics.jsonl in which its last line stands."""
STYLES = {DONE: "green", RUNNING: "cyan", STOPPED: "dim", WAITING: "dim"}


class Board:
    """The live leaderboard of one sweep; `update` it, and leave the block at the end.

    Args:
        screen: where the sweep tells everything else.
        section: the recipe's `tune`.
        total_steps: of a trial, as far as it is known.
        now: seconds of a steady clock.
    """

    def __init__(
        self,
        screen: Screen,
        section: TuneSection,
        total_steps: int,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.screen, self.section, self.total_steps = screen, section, total_steps
        self.trials: list[Trial] = []
        self._told: dict[int, tuple[str, int]] = {}
        self._turned: dict[int, int] = {}
        self._pace = Pace(total_steps, now)
        self._live: Live | None = None

    def __enter__(self) -> Board:
        """Begin to draw, on a terminal."""
        if self.screen.console.is_terminal:
            self._live = Live(console=self.screen.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the whole table behind."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.trials:
            self.screen.line("leaderboard", "italic")
            self.screen.show(self.table())

    def update(self, trials: Sequence[Trial]) -> None:
        """Show the trials as they are now."""
        self.trials = ranked(trials, self.section.mode)
        self._pace.update(trials)
        if self._live is not None:
            self._live.update(self.table(rows=max(3, self.screen.console.height - 8)))
        for trial in sorted(trials, key=lambda one: one.number):
            self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        """Say it if a trial's state or values changed, or its steps passed an interval."""
        if len(trial.turns) != self._turned.get(trial.number, 0):
            self._turned[trial.number] = len(trial.turns)
            last = replace(trial, turns=trial.turns[-1:])
            self._say(*lines_of([last]))
        before, every = self._told.get(trial.number, (WAITING, 0)), self.screen.log_every
        moved = trial.step // every > before[1] // every or (trial.step > 0 and before[1] == 0)
        if trial.state != before[0] or (moved and trial.state == RUNNING):
            left = self._pace.left(self.trials)
            eta = "" if left is None else f" | at most {clock(left)} to go"
            self._say(self._line(trial) + eta)
            self._told[trial.number] = (trial.state, trial.step)

    def _say(self, *lines: str) -> None:
        for line in lines:
            if self._live is not None:
                self.screen.note(line)
            else:
                self.screen.line(line, "none")  # a style: no markup is read

    def _line(self, trial: Trial) -> str:
        parts = [f"trial {trial.number}", assignments(trial.values)]
        if trial.step:
            parts.append(f"step {trial.step}/~{self.total_steps}")
        if trial.metric is not None:
            parts.append(f"{self.section.metric} {figure(trial.metric)}")
        return " | ".join([*parts, trial.state])

    def table(self, rows: int | None = None) -> RenderableType:
        """Lay out the trials, and under them why some failed.

        Args:
            rows: trials shown at most; None: all.
        """
        begun = [one for one in self.trials if rows is None or one.state != WAITING or one.step]
        shown = begun if rows is None else begun[:rows]
        fields = list(dict.fromkeys(name for one in self.trials for name in one.values))
        cells = [self._cells(place, one, fields) for place, one in enumerate(shown, start=1)]
        heads = ["", "trial", *_heads(fields, cells), self.section.metric, "step", "tok/s", "state"]
        if _width(heads, cells) > self.screen.console.width:  # their values in one column
            heads[2 : 2 + len(fields)] = ["values"]
            for row, one in zip(cells, shown, strict=True):
                row[2 : 2 + len(fields)] = [assignments(one.values)]
        table = _table(heads)
        for row, one in zip(cells, shown, strict=True):
            table.add_row(*map(Text, row), style=STYLES.get(one.state))
        lost = [one for one in self.trials if one.state.startswith(FAILED)]
        notes = [
            Text(f"trial {one.number} {one.state}", style="red", no_wrap=rows is not None,
                 overflow="fold" if rows is None else "ellipsis")
            for one in lost[: None if rows is None else REASONS]
        ]  # fmt: skip
        if rows is None:
            notes += [Text(line) for line in lines_of(self.trials)]
        if len(begun) > len(shown):
            notes.append(Text(f"... {len(begun) - len(shown)} more", style="dim"))
        return Group(Text(self.headline(), style="bold"), table, *notes)

    def headline(self) -> str:
        """Say how far the sweep is."""
        counts = Counter("failed" if one.state.startswith(FAILED) else one.state
                         for one in self.trials)  # fmt: skip
        parts = [f"{counts.pop(DONE, 0)} of {len(self.trials)} trials done"]
        order = (RUNNING, STOPPED, "failed", WAITING)
        parts += [f"{counts[state]} {state}" for state in order if counts[state]]
        left = self._pace.left(self.trials)
        return ", ".join(parts) + ("" if left is None else f" | at most {clock(left)} to go")

    def _cells(self, place: int, trial: Trial, fields: Sequence[str]) -> list[str]:
        speed = None if trial.state != RUNNING else speed_of(trial.folder)
        steps = f"{trial.step}/~{self.total_steps}" if trial.state == RUNNING else f"{trial.step}"
        return [
            str(place),
            str(trial.number),
            *(short_value(trial.values.get(name, "")) for name in fields),
            figure(trial.metric),
            steps,
            "" if speed is None else f"{speed:,.0f}",
            "failed" if trial.state.startswith(FAILED) else trial.state,
        ]


def _heads(fields: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the fields' names, cut where they are far longer than their values."""
    heads = []
    for column, name in enumerate(fields, start=2):
        short = short_field(name, fields)
        room = max([SHORTEST, *(len(row[column]) for row in cells)])
        heads.append(short if len(short) <= room else short[: room - 1] + "…")
    return heads


def _width(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Return the columns of a terminal that a table takes."""
    widest = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    return sum(widest) + 2 * (len(widest) - 1) + 1


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for head in heads:
        if head == "values":
            table.add_column(head, overflow="fold")
            continue
        left = head == "state"
        table.add_column(Text(head), justify="left" if left else "right", no_wrap=True)
    return table


class Pace:
    """When a sweep will be over, by the steps that its trials took while it was watched."""

    def __init__(self, total_steps: int, now: Callable[[], float]) -> None:
        self.total_steps, self.now = total_steps, now
        self._first: tuple[float, int] | None = None
        self._last = (0.0, 0)

    def update(self, trials: Iterable[Trial]) -> None:
        """Note the steps so far."""
        seen = (self.now(), sum(one.step for one in trials))
        self._first = self._first or seen
        self._last = seen

    def left(self, trials: Iterable[Trial]) -> float | None:
        """Return seconds until all trials are over if none is stopped; None: not known yet.

        The first steps tell little: trials that start have taken none.
        """
        if self._first is None:
            return None
        (began, before), (now, after) = self._first, self._last
        left = sum(max(0, self.total_steps - one.step) for one in trials if not one.is_over)
        if after - before < ENOUGH * (left + after - before) or not left:
            return None
        return left * (now - began) / (after - before)


def speed_of(folder: Path) -> float | None:
    """Return the tokens per second of a run's last step; None where none is written yet."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().splitlines()
        found = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return number(found.get("tokens_per_s")) if isinstance(found, dict) else None


def write_leaderboard(sweep: Path, section: TuneSection, trials: Iterable[Trial]) -> None:
    """Write leaderboard.jsonl, a line for each trial, best first; whole or not at all."""
    lines = (
        {
            "trial": one.number, **one.values, section.metric: one.metric, "steps": one.step,
            "state": one.state, "seconds": one.seconds, "folder": str(one.folder),
            **({"turns": turns_of(one)} if one.turns else {}),
        }
        for one in ranked(trials, section.mode)
    )  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary = sweep / f".{FILE}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(sweep / FILE)
