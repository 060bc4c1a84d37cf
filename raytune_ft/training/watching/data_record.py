"""What became of the rows: a run's data.json, and the lines that say it while it runs.

Counts are those of the first epoch, told once however often a run is taken up again.
"""

from __future__ import annotations

from typing import Any

from raytune_ft.data.report import CUT, SPLIT, Report, add_report
from raytune_ft.training.batching import StepData
from raytune_ft.training.run_folder import RunFolder, read_json, write_json
from raytune_ft.training.saving.checkpoint import TrainState

FILE = "data.json"


def write(folder: RunFolder, state: TrainState, max_length: int, steps: int) -> None:
    """Put the counts so far into data.json; what else stands there stays.

    Without a count (`data.compat` counts rows before training) nothing is written.

    Args:
        folder: of the run.
        state: has the counts.
        max_length: tokens that a pack has room for.
        steps: optimizer steps of the run, as far as they are known.
    """
    if not state.rows["rows"]:
        return
    path = folder.path / FILE
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    write_json(path, {**known, **counts(state, max_length), "steps": steps})


def count(state: TrainState, data: StepData, *, ends: bool) -> list[str]:
    """Count what became of the first epoch's rows; return a line where a new kind of loss comes up.

    Args:
        state: behind the step.
        data: of the step.
        ends: whether the first epoch ends with it, which is told in any case.
    """
    if data.epoch > 0:
        return []
    known = kinds(state.rows)
    add_report(state.rows, data.report)
    state.packs += data.n_packs
    state.pack_tokens += data.n_tokens
    found = kinds(state.rows)
    if not (found - known or (ends and found)):
        return []
    line = loss_line(state.rows)
    return [f"first epoch: {line}" if ends else line]


def counts(state: TrainState, max_length: int) -> dict[str, Any]:
    """Return rows, packs and how full these are; `exact` if it is those of a whole epoch.

    `visited` is the share of the first epoch, 0 to 1, that has been trained on.
    """
    room = state.packs * max_length
    return {
        **state.rows,
        "packs": state.packs,
        "density": round(state.pack_tokens / room, 4) if room else 0.0,
        "exact": state.epoch > 0,
        "visited": round(min(1.0, state.progress), 4),
    }


def kinds(report: Report) -> set[str]:
    """Name what happened to rows that are not used as they are."""
    cut = {kind for kind in (CUT, SPLIT) if _count(report, kind)}
    if report["left_out"]:
        cut.add("left out")
    return cut | {reason for reason, count in report["dropped"].items() if count}


def loss_line(report: Report | dict[str, Any]) -> str:
    """Say in one line which rows are dropped, cut or split, naming the first of each.

    `dropped 3 of 40 rows: 2 unusable (first: a.jsonl:12: ...), 1 empty (...); 1 cut (...)`.
    """
    dropped = sum(report["dropped"].values())
    reasons = [
        f"{count:,} {reason}{_first(report, reason)}"
        for reason, count in report["dropped"].items()
        if count
    ]
    parts = [f"dropped {dropped:,} of {report['rows']:,} rows: {', '.join(reasons)}"]
    parts = parts if dropped else []
    for kind in (CUT, SPLIT):
        if count := _count(report, kind):
            parts.append(f"{kind} {count:,} of {report['rows']:,} rows{_first(report, kind)}")
    if report.get("left_out"):
        parts.append(
            f"left out {report['left_out']:,} tokens of used rows, nothing in them learned"
        )
    return "; ".join(parts)


def _count(report: Report | dict[str, Any], kind: str) -> int:
    return report["cut"] if kind == CUT else report["split"]


def _first(report: Report | dict[str, Any], reason: str) -> str:
    places = report["places"].get(reason)
    if not places:
        return ""
    # a row must not steer the terminal
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in places[0])
    return f" (first: {text.partition(';')[0]})"
