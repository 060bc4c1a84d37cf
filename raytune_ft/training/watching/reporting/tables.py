"""Tables: what a run recorded in, HTML out; what a run, row or model wrote is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytune_ft.training.run_folder import Event
from raytune_ft.training.watching.reporting.series import evenly, number
from raytune_ft.training.watching.reporting.style import text
from raytune_ft.training.watching.reporting.summary import Answers, as_words

MOMENTS = 12
"""Answers to one prompt that are shown; the others stand in samples.jsonl."""
PROMPTS = 40
LONGEST = 1500
"""Characters of an answer that are shown."""
MEASUREMENTS = 30


def cards(figures: Mapping[str, str]) -> str:
    """Lay the main figures side by side."""
    parts = (f"<div class=card><b>{v}</b><span>{k}</span></div>" for k, v in figures.items())
    return f"<div class=cards>{''.join(parts)}</div>"


def pairs(content: Mapping[str, Any]) -> str:
    """Lay names and values under each other."""
    rows = "".join(
        f"<tr><th>{text(key)}</th><td>{text(as_words(value))}</td></tr>"
        for key, value in content.items()
    )
    return f"<table class=pairs>{rows}</table>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, best: int | None = None) -> str:
    """Lay rows under a head; numbers stand right, the row numbered `best` is bold."""
    titles = "".join(f"<th>{text(title)}</th>" for title in head)
    body = "".join(
        f"<tr{' class=best' if place == best else ''}>"
        + "".join(f"<td>{text(cell)}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    return f"<div class=scroll><table class=num><tr>{titles}</tr>{body}</table></div>"


def answer_moments(answers: Answers) -> str:
    """Show each prompt with its answers in time; one that stays the same is shown once."""
    parts = []
    for prompt, by_moment in list(answers.items())[:PROMPTS]:
        shown = evenly(changes(by_moment), MOMENTS)
        cells = "".join(
            f"<div class=moment><b>{text(when)}</b><p>{text(_cut(answer))}</p></div>"
            for when, answer in shown
        )
        parts.append(f"<h3>{text(_cut(prompt))}</h3><div class=moments>{cells}</div>")
    left = len(answers) - PROMPTS
    more = f"<p class=sub>{left} more prompts in samples.jsonl</p>" if left > 0 else ""
    return "".join(parts) + more


def changes(by_moment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Join moments in a row whose answers are the same: `step 20 to after`."""
    runs: list[tuple[str, str, str]] = []
    for when, answer in by_moment.items():
        if runs and runs[-1][2] == answer:
            runs[-1] = (runs[-1][0], when, answer)
        else:
            runs.append((when, when, answer))
    return [(a if a == b else f"{a} to {b}, the same", answer) for a, b, answer in runs]


def _cut(words: str) -> str:
    return words if len(words) <= LONGEST else words[:LONGEST] + " …"


def mmlu_table(lines: list[Event]) -> str:
    """Lay the accuracies of a run's MMLU questions under each other; nothing without any."""
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line.get("categories", {})))
    rows = []
    for line in lines:
        shares = [line.get("average"), *(line.get("categories", {}).get(name) for name in names)]
        known = [number(share) for share in shares]
        cells = ["" if share is None else f"{share:.2f}" for share in known]
        rows.append([line.get("name"), line.get("step"), _count(line.get("questions")), *cells])
    head = ["file", "step", "questions", "average", *names]
    return f"<h2>MMLU, percent right</h2>{table(head, rows)}"


def _count(value: object) -> str:
    known = number(value)
    return "" if known is None else f"{known:,.0f}"


def measured_table(lines: Iterable[Event], best_step: int | None) -> str:
    """Lay what was measured on held-out rows under each other; nothing without any."""
    found = [line for line in lines if number(line.get("val_loss")) is not None]
    if not found:
        return ""
    names = [name for name in found[-1] if name.startswith("val_")]
    shown = evenly(found, MEASUREMENTS)
    steps = [line.get("step") for line in shown]
    rows = [[line.get("step"), *(_figure(line.get(name)) for name in names)] for line in shown]
    best = steps.index(best_step) if best_step in steps else None
    head = ["step", *(name.removeprefix("val_").replace("_", " ") for name in names)]
    note = "" if best is None else f"<p class=sub>best: step {best_step}</p>"
    return f"<h2>Held-out rows</h2>{table(head, rows, best=best)}{note}"


def benchmark_table(records: Mapping[str, Event]) -> str:
    """Lay what `raytune-ft eval` measured under each other, by file; nothing without any."""
    rows: list[list[object]] = []
    for name, record in records.items():
        results = record.get("results")
        for task, measured in results.items() if isinstance(results, dict) else ():
            for key, value in measured.items() if isinstance(measured, dict) else ():
                metric, _, kind = str(key).partition(",")  # as the harness names it: acc,none
                if kind and not metric.endswith("_stderr") and number(value) is not None:
                    error = _figure(measured.get(f"{metric}_stderr,{kind}"))
                    shown = metric if kind == "none" else f"{metric} ({kind})"
                    rows.append([task, shown, _figure(value), error, name])
    if not rows:
        return ""
    return f"<h2>Benchmarks</h2>{table(['task', 'metric', 'value', '±', 'file'], rows)}"


def _figure(value: object) -> str:
    known = number(value)
    return "" if known is None else f"{known:.4f}" if abs(known) < 100 else f"{known:,.1f}"
