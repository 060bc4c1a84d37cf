"""Sending: a sweep's folder here in; the same sweep at its address out, beside the trials.

What stands there may be taken up at any moment, so no line of the ledger goes before what it speaks
of, and nothing before the line that speaks of it:

- a trial's folder is sent once the ledger there has planned it: what no ledger knows could be taken
  for a trial of other values;
- a trial's end is said there when the folder is there as it was at that end, its result whole;
- a checkpoint that stood here when a line was written is there before that line, and one that was
  removed here is removed there behind the lines that say why it may be.

So the ledger there is the beginning of the one here, and trials are at least as far as it says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from raytune_ft.storing import fetching, steps
from raytune_ft.storing.mirror import Mirror, Stamp, stamps
from raytune_ft.storing.places import Place
from raytune_ft.sweeping.trials import name_of
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching.reporting.sweeps import ENDS, STATES


class SweepMirror(Mirror):
    """Sends a sweep while the block runs, and the rest of it behind the block.

    Args:
        sweep: its folder here, whose ledger goes on from the one that is there, if any.
        place: where it is sent to.
        keep: `checkpoint.keep` of its trials.
        settings: as `Mirror` takes them.
    """

    def __init__(self, sweep: RunFolder, place: Place, keep: int, **settings: Any) -> None:
        super().__init__(sweep, place, place.address, keep, **settings)
        self._there_is = place
        self._trials: dict[int, Mirror] = {}
        self._ledger: bytes | None = None
        """As it stands there."""
        trials = sweep.path / steps.TRIALS
        trials.mkdir(parents=True, exist_ok=True)
        # a trial is a run of its own, and may be asked for by its address
        (trials / fetching.ADDRESS).write_text(f"{place.address}/{steps.TRIALS}", encoding="utf-8")

    def _send_new(self, *, everything: bool) -> None:
        is_behind = True
        while is_behind:
            here = steps.whole_lines((self.run.path / steps.LEDGER).read_bytes())
            there = self._known(here)
            known = {number: mirror.there for number, mirror in self._trials.items()}
            self._send_trials(here, there, everything=everything)
            told = _tellable(here, _planned(there))
            if told != self._ledger:
                self.place.write(steps.LEDGER, told)
                self._ledger = told
            for number, among in known.items():
                self._trials[number].prune(among)  # what was sent just now may be of later lines
            is_behind = everything and there != here  # what was planned since is sent now
        if everything:
            for mirror in self._trials.values():
                mirror.prune()
        if everything or time.monotonic() - self._small_at >= self.every_s:
            self._send_small(everything=everything)

    def _known(self, here: bytes) -> bytes:
        """Return what of the ledger here stands there."""
        if self._ledger is None:
            with suppress(FileNotFoundError):
                self._ledger = self.place.read(steps.LEDGER)
            for number in _over(_common(here, self._ledger or b"")):  # it is there already
                folder = self._folder_of(number)
                if folder.run_json.is_file():
                    self._trials[number] = self._mirror_of(folder, stamps(folder))
        return _common(here, self._ledger or b"")

    def _send_trials(self, here: bytes, there: bytes, *, everything: bool) -> None:
        """Send what is new of the trials that the ledger there knows."""
        over, told = _over(here), _over(there)
        for number in sorted(_planned(there) if everything else _planned(there) - told):
            folder = self._folder_of(number)
            if folder.run_json.is_file():
                if number not in self._trials:
                    self._trials[number] = self._mirror_of(folder)
                self._trials[number].add(everything=everything or number in over)

    def _folder_of(self, number: int) -> RunFolder:
        return RunFolder(self.run.path / steps.TRIALS / name_of(number))

    def _mirror_of(self, folder: RunFolder, known: Mapping[str, Stamp] | None = None) -> Mirror:
        place = self._there_is / f"{steps.TRIALS}/{folder.path.name}"
        return Mirror(folder, place, place.address, self.keep, every_s=self.every_s, known=known)


def _events(ledger: bytes) -> Iterator[tuple[bytes, int, str]]:
    """Yield each line, the trial that it speaks of, and what happened to that."""
    for line in ledger.splitlines(keepends=True):
        event = json.loads(line)
        yield line, int(event["trial"]), event["event"]


def _planned(ledger: bytes) -> set[int]:
    return {trial for _, trial, kind in _events(ledger) if kind == "planned"}


def _is_end(kind: str) -> bool:
    return STATES.get(kind) in ENDS


def _over(ledger: bytes) -> set[int]:
    return {trial for _, trial, kind in _events(ledger) if _is_end(kind)}


def _common(one: bytes, other: bytes) -> bytes:
    """Return the lines that two ledgers begin with alike."""
    if one.startswith(other):
        return steps.whole_lines(other)
    pairs = zip(one.splitlines(keepends=True), other.splitlines(keepends=True), strict=False)
    same = b""
    for ours, theirs in pairs:
        if ours != theirs:
            break
        same += ours
    return same


def _tellable(ledger: bytes, sent: set[int]) -> bytes:
    """Return the ledger up to the first end of a trial whose folder was not sent yet."""
    told = b""
    for line, trial, kind in _events(ledger):
        if _is_end(kind) and trial not in sent:
            break
        told += line
    return told
