"""Lineage: trials whose values changed on the way in, what is told and written of that out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_ft.sweeping.trials import Trial
from raytune_ft.sweeping.words import assignments
from raytune_ft.training.watching.reporting.style import text

FILE = "best_lineage.json"
NOTE = (
    "# These are trial {number}'s last values, from step {step} on: they changed on the way, as\n"
    "# tune.scheduler pbt has it. Trained with from the beginning they make another run;\n"
    f"# {FILE} has the values by steps.\n"
)


def turns_of(trial: Trial) -> list[dict[str, Any]]:
    """Return a trial's values by steps as plain values; nothing if they never changed."""
    return [
        {"step": turn.step, "values": turn.values}
        | ({} if turn.source is None else {"from": turn.source})
        for turn in trial.turns
    ]


def ancestry(trials: Mapping[int, Trial], number: int) -> list[dict[str, Any]]:
    """Return which trials trained the weights that a trial ended with, from which step, and how.

    The earliest comes first: `from_step`, `trial` and `values`.
    """
    found: list[dict[str, Any]] = []
    before: float = float("inf")
    while True:
        trial = trials[number]
        turn = next((t for t in reversed(trial.turns) if t.step < before), None)
        values = trial.values if turn is None else turn.values
        step = 0 if turn is None else turn.step
        found.insert(0, {"from_step": step, "trial": number, "values": values})
        if turn is None or turn.source is None:
            return found
        number, before = turn.source, turn.step


def note_of(trial: Trial) -> str:
    """Return what the first lines of a trial's recipe say of it; nothing if its values stayed."""
    if not trial.turns:
        return ""
    return NOTE.format(number=trial.number, step=trial.turns[-1].step)


def write(sweep: Path, trials: Iterable[Trial], best: Trial) -> None:
    """Write best_lineage.json, whole or not at all, if the best trial's values changed."""
    if not best.turns:
        return
    by_number = {one.number: one for one in trials}
    content = {"trial": best.number, "weights": ancestry(by_number, best.number)}
    temporary = sweep / f".{FILE}"
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(sweep / FILE)


def lines_of(trials: Iterable[Trial]) -> list[str]:
    """Say of each trial that went on with others' weights which, and with what values."""
    return [
        f"trial {one.number} went on as "
        + ", ".join(
            f"trial {turn.source} at step {turn.step} with {assignments(turn.values)}"
            for turn in one.turns
            if turn.source is not None
        )
        for one in sorted(trials, key=lambda one: one.number)
        if one.turns
    ]


def lineage_part(trials: Sequence[Trial]) -> str:
    """Show on the sweep's page who went on with whose weights; nothing if nobody did."""
    turns = sorted(
        (turn.step, one.number, turn.source, assignments(turn.values))
        for one in trials
        for turn in one.turns
        if turn.source is not None
    )
    if not turns:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "trial", "went on as", "with"))
    rows = "".join(
        f"<tr><td>{step:,}</td><td>{number}</td><td>trial {source}</td><td>{text(values)}</td></tr>"
        for step, number, source, values in turns
    )
    return (
        f"<h2>Lineage</h2><div class=scroll><table class='num trials'><tr>{head}</tr>{rows}"
        "</table></div>"
    )
