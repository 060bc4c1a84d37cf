"""A rank killed by kill -9, and one that stands still, in a run through Ray Train with NCCL.

In: two starts of the same recipe, one to disturb. Out: whether the disturbed run went on by itself
to its end, with the rows of the other one, and how far its losses are off.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from benchmarks.scaling_runs import Run

LEDGER = ("step", "epoch", "progress", "lr", "tokens", "targets", "rows")
"""Fields of a step that no clock, no machine and no order of additions says."""
TOLERANCE = 2e-2
"""Relative, of a loss in bfloat16: sums over ranks come in another order behind a restart."""
KILL_AT, STOP_BEHIND = 6, 6
"""Step at which a rank is killed, and steps later at which the other kind of end comes."""
SOON_S = 240.0
"""Most that a run takes from an injury to its next new step."""


def disturb(run: Run, limit_s: int, victim: int, deadline: float) -> dict[str, Any]:
    """Kill a rank, let the run go on, stop another one's process, and see the run to its end."""
    told: dict[str, Any] = {"victim": victim}
    if not run.wait_until(lambda: run.step() >= KILL_AT, deadline):
        return told | {"failed": f"step {KILL_AT} has not come"}
    told["killed"] = _injure(run, victim, signal.SIGKILL, deadline)
    behind = told["killed"]["step"] + STOP_BEHIND
    if not run.wait_until(lambda: run.step() >= behind, deadline):
        return told | {"failed": f"step {behind} has not come behind the kill"}
    told["stopped"] = _injure(run, victim, signal.SIGSTOP, deadline) | {"limit_s": limit_s}
    told["code"] = run.wait(deadline)
    stacks = {file.name: file.read_text() for file in sorted((run.path / "stacks").glob("rank_*"))}
    told["stacks"] = {name: text.splitlines()[0] for name, text in stacks.items()}
    told["stopped_one_is_named"] = sum("is T (stopped)" in text for text in stacks.values()) == 1
    told["failures"] = [line["words"][:160] for line in run.lines("failures.jsonl")]
    return told


def _injure(run: Run, rank: int, number: signal.Signals, deadline: float) -> dict[str, Any]:
    """Send a signal; return the step it came at, and seconds to the next new step."""
    pid = run.signal_rank(rank, number)
    at, step = time.monotonic(), run.step()
    soon = min(deadline, at + SOON_S)
    went_on = run.wait_until(lambda: run.step() > step, soon)
    # what the ledger had behind the signal may have been written by the rank that lived on
    if went_on and time.monotonic() - at < 1.0:
        step = run.step()
        went_on = run.wait_until(lambda: run.step() > step, soon)
    seconds = round(time.monotonic() - at, 1) if went_on else None
    return {"pid": pid, "step": step, "seconds_to_a_new_step": seconds}


def compare(hurt: Run, whole: Run) -> dict[str, Any]:
    """Compare the ledgers of a disturbed and of an undisturbed run."""
    ours, theirs = hurt.lines("metrics.jsonl"), whole.lines("metrics.jsonl")
    rows = [[{key: step[key] for key in LEDGER} for step in steps] for steps in (ours, theirs)]
    apart = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=False)
    ]
    return {
        "steps": [len(ours), len(theirs)],
        "ledger_equal": bool(ours) and rows[0] == rows[1],
        "largest_loss_difference": max(apart, default=None),
        "equal_losses": sum(one == 0.0 for one in apart),
        "tolerance": TOLERANCE,
        "losses_within": bool(apart) and max(apart) <= TOLERANCE,
    }
