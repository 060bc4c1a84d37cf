"""Tables of the scaling benchmark: its lines of JSON in, Markdown for docs/benchmarks.md out.

Run: python -m benchmarks.scaling_table FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

MB = 1e6
Line = dict[str, Any]


def show(results: list[Line], out: TextIO) -> None:
    """Print every table that there are results for."""
    for title, rows in (
        ("throughput", _throughput(results)),
        ("ZeRO-3, all weights of a 1B shape", _zero3(results)),
        ("others", _others(results)),
    ):
        if len(rows) > 2:
            print(f"\n{title}\n", *rows, sep="\n", file=out)


def _row(*cells: object) -> str:
    words = ("" if cell is None else " ".join(str(cell).split()) for cell in cells)
    return f"| {' | '.join(words)} |"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*("---" for _ in names))]


def _throughput(results: list[Line]) -> list[str]:
    rows = _head(
        "GPUs", "gradients summed", "micro-steps", "tok/s", "range", "s/step", "efficiency",
        "slowest/fastest rank", "sent per rank and step, MB", "by the model: every micro-step",
        "once a step", "peak GiB, ranks",
    )  # fmt: skip
    timed = [one for one in results if one["piece"] in ("throughput", "each")]
    alone = next((o["tokens_per_s"] for o in timed if o["ranks"] == 1 and o.get("steps")), None)
    for one in timed:
        if not one.get("steps"):
            rows.append(_row(one["ranks"], one.get("skipped") or one.get("ended", "")[-200:]))
            continue
        share = f"{one['tokens_per_s'] / one['ranks'] / alone:.1%}" if alone else None
        model = {way: f"{size / MB:,.1f}" for way, size in one["sent_by_model"].items()}
        sent = sorted({f"{size / MB:,.1f}" for size in one["sent_per_rank"]})
        rows.append(_row(
            one["ranks"], one["asked_for"], one["micro_steps"], f"{one['tokens_per_s']:,}",
            "-".join(f"{speed:,}" for speed in one["tokens_per_s_range"]), one["step_s"], share,
            one["slowest_over_fastest_rank"], " to ".join(sent[:1] + sent[1:][-1:]),
            model["every micro-step"], model["once a step"],
            ", ".join(f"{peak:g}" for peak in one["peak_gib_per_rank"]),
        ))  # fmt: skip
    return rows


def _zero3(results: list[Line]) -> list[str]:
    rows = _head("GPUs", "losses", "finite and falling", "peak GiB, ranks", "tok/s", "at the end")
    for one in results:
        if one["piece"] == "zero3" and one.get("steps"):
            rows.append(_row(
                one["ranks"], " -> ".join(map(str, one["loss"])), one["finite_and_falling"],
                ", ".join(f"{peak:g}" for peak in one["peak_gib_per_rank"]),
                f"{one['tokens_per_s']:,}", one["saved_and_exported"],
            ))  # fmt: skip
        elif one["piece"] == "zero3":
            rows.append(_row(one["ranks"], one.get("skipped") or one.get("words", "")[-200:]))
    return rows


def _others(results: list[Line]) -> list[str]:
    rows = _head("piece", "what came of it")
    for one in results:
        if one["piece"] == "equal":
            rows += [_row("equal", line) for line in one.get("lines", [])]
            rows.append(_row("equal", f"pytest's exit code {one['code']}"))
        elif one["piece"] == "kill":
            rows += [_row("kill", text) for text in _kill(one)]
        elif one["piece"] == "gpu8":
            losses = one.get("losses") or ["none"]
            rows.append(_row("gpu8", one.get("skipped") or (
                f"{one.get('steps')} steps on {one['ranks']} GPUs (it asks for 8), exit code "
                f"{one['code']}, loss {losses[0]} -> {losses[-1]}, {one.get('tokens_per_s')} tok/s"
            )))  # fmt: skip
        elif one["piece"] == "failed":
            rows.append(_row("failed", one["traceback"].strip().splitlines()[-1]))
    return rows


def _kill(one: Line) -> list[str]:
    if "skipped" in one or "failed" in one:
        return [one.get("skipped") or one["failed"]]
    killed, stopped = one["killed"], one["stopped"]
    return [
        f"rank {one['victim']} killed at step {killed['step']}: a new step "
        f"{killed['seconds_to_a_new_step']} s later",
        f"the same rank stopped at step {stopped['step']}: a new step "
        f"{stopped['seconds_to_a_new_step']} s later, limit {stopped['limit_s']} s, stacks of "
        f"{len(one['stacks'])} ranks, the stopped one named: {one['stopped_one_is_named']}",
        f"exit code {one['code']}, ledger equal: {one['ledger_equal']}, {one['equal_losses']} of "
        f"{one['steps'][0]} losses equal, largest difference {one['largest_loss_difference']} of "
        f"{one['tolerance']} allowed",
    ]


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    show([json.loads(line) for line in text.splitlines()], sys.stdout)
