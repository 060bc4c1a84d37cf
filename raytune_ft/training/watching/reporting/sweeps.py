"""Sweeps in a list of runs: what became of their trials, counted from ledger or run folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl

LEDGER, TRIALS = "trials.jsonl", "trials"
STATES = {
    "planned": "waiting", "started": "running", "done": "done", "stopped": "stopped early",
    "failed": "failed", "paused": "waiting",
}  # fmt: skip
"""Event of the ledger and what a trial is from then on; other events change nothing."""
ENDS = ("done", "stopped early", "failed")
ORDER = ("done", "stopped early", "running", "waiting", "interrupted", "failed")


def trials_of(folder: RunFolder, *, runs: bool) -> dict[str, int] | None:
    """Count the trials of a sweep by their state; None of a run that is no sweep.

    Args:
        folder: of the sweep.
        runs: whether the sweep goes on; else none of its trials does.
    """
    if (folder.path / LEDGER).is_file():
        return count(read_jsonl(folder.path / LEDGER), runs=runs)
    if not (folder.path / TRIALS).is_dir():
        return None
    found = Counter(_state(place) for place in (folder.path / TRIALS).iterdir() if place.is_dir())
    return _ordered(found, runs=runs)


def count(ledger: Iterable[Event], *, runs: bool) -> dict[str, int]:
    """Count trials by what their last event says; lines that say nothing are passed over."""
    known: dict[object, str] = {}
    for event in ledger:
        state = STATES.get(str(event.get("event"))) if isinstance(event, dict) else None
        trial = str(event.get("trial")) if state else ""
        if state and known.get(trial) not in ENDS:
            known[trial] = state
    return _ordered(Counter(known.values()), runs=runs)


def as_words(trials: dict[str, int]) -> str:
    """Write counts on one line, as `9 done, 2 running`."""
    return ", ".join(f"{number} {state}" for state, number in trials.items()) or "none yet"


def progress(trials: dict[str, int]) -> str:
    """Write how many trials are over, as `11/16 trials`."""
    return f"{sum(trials.get(state, 0) for state in ENDS)}/{sum(trials.values())} trials"


def _ordered(found: Counter[str], *, runs: bool) -> dict[str, int]:
    if not runs:
        found["interrupted"] += found.pop("running", 0)
    return {state: found[state] for state in ORDER if found[state]}


def _state(place: Path) -> str:
    from raytune_ft.training.watching.reporting.summary import lenient

    said = str(lenient(RunFolder(place), "run.json").get("status", "waiting"))
    return said if said in ORDER else "failed" if said.startswith("failed") else "interrupted"
