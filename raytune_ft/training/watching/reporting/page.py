"""`report.html`: one run on one page, without scripts and without a request to anywhere.

It is written for every run that has a folder: a run that failed, was killed or still goes on has
the same page with less on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from raytune_ft.config.schema import Recipe
from raytune_ft.config.written import dump_changes
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl
from raytune_ft.training.watching.reporting import tables
from raytune_ft.training.watching.reporting.charts import run_figures
from raytune_ft.training.watching.reporting.listing import keep_figures, status_of
from raytune_ft.training.watching.reporting.loss_png import draw_loss
from raytune_ft.training.watching.reporting.memory_table import memory_table
from raytune_ft.training.watching.reporting.series import Columns, number
from raytune_ft.training.watching.reporting.style import page, text
from raytune_ft.training.watching.reporting.summary import Summary, lenient, summarize

FILES = 20
"""Records of `raytune-ft eval` that are shown, by their names."""
ROWS_ANSWERED = 12
"""Held-out rows whose answers are shown."""


def write_report(folder: RunFolder) -> Path:
    """Write loss.png and report.html; return the latter's path."""
    measured: list[Event] = []
    columns = Columns(_noting(read_jsonl(folder.metrics), measured))
    draw_loss(columns, folder.path / "loss.png")
    report = folder.path / "report.html"
    summary = summarize(folder, columns)
    content = _page(folder, columns, summary, measured)
    keep_figures(folder, columns, summary)
    temporary = report.with_name(f".{report.name}")
    temporary.write_text(content, encoding="utf-8", errors="replace")
    temporary.replace(report)
    return report


@contextmanager
def left_with_report(folder: RunFolder) -> Iterator[None]:
    """Write the report of a run that ends with an error, if it took a step, then pass it on."""
    try:
        yield
    except BaseException:
        if folder.run_json.is_file() and folder.metrics.is_file():
            with suppress(OSError):  # a full disk is the error that is told already
                write_report(folder)
        raise


def _noting(lines: Iterator[Event], measured: list[Event]) -> Iterator[Event]:
    """Pass lines on and keep what those with a validation measured."""
    for line in lines:
        if isinstance(line, dict) and line.get("val_loss") is not None:
            kept = ("step", *(name for name in line if str(name).startswith("val_")))
            measured.append({name: line.get(name) for name in kept})
        yield line


def _page(folder: RunFolder, columns: Columns, summary: Summary, measured: list[Event]) -> str:
    info = lenient(folder, "run.json")
    parts = [
        _head(folder, info),
        tables.cards(main_figures(summary)),
        run_figures(columns),
        _answers(summary),
        tables.measured_table(measured, (summary.best or {}).get("step")),
        _evaluations(folder),
        tables.mmlu_table([line for line in read_jsonl(folder.mmlu) if isinstance(line, dict)]),
        _benchmarks(folder),
        _data(summary.rows),
        memory_table(info, columns),
        _recipe(folder),
        f"<h2>Environment</h2>{tables.pairs(lenient(folder, 'environment.json'))}",
    ]
    return page(str(info.get("name", folder.path.name)), parts)


def _head(folder: RunFolder, info: Event) -> str:
    status = status_of(folder, info)
    known = (info.get(name) for name in ("created", "source", "model_folder"))
    about = " · ".join(text(one) for one in known if one)
    parts = [
        f"<h1>{text(info.get('name', folder.path.name))} "
        f"<span class='tag {text(status)}'>{text(status)}</span></h1>",
        f"<p class=sub>{about} · raytune_ft {text(info.get('version', ''))}</p>",
    ]
    parts += [f"<p class=note>{text(words)}</p>" for words in failures(folder)]
    return "".join(parts)


def failures(folder: RunFolder) -> list[str]:
    """Return the words of the errors that ended a run or one of its attempts."""
    lines = read_jsonl(folder.path / "failures.jsonl")
    words = (str(line.get("words")) for line in lines if isinstance(line, dict))
    return list(dict.fromkeys(words))


def main_figures(summary: Summary, *, best_apart: bool = False) -> dict[str, str]:
    """Return what one wants to know first, in words; what is not known is left out.

    `best_apart` leaves out the best measurement, whose name has its step.
    """
    found = {
        "loss, first to last": f"{summary.first_loss:.3f} → {summary.last_loss:.3f}",
        "held-out loss": _spelled(summary.val_loss, "{:.4f}"),
        "optimizer steps": f"{summary.steps:,}",
        "tokens": _large(summary.tokens),
        "of them trained": _large(summary.targets),
        "tokens per second": _spelled(summary.speed, "{:,.0f}"),
        "MFU": _spelled(summary.mfu, "{:.1%}"),
        "waiting for data": _spelled(summary.data_wait, "{:.1%}"),
        "memory at the peak": _spelled(summary.memory_gib, "{:.2f} GiB"),
        "time of training steps": clock(summary.seconds),
        "steps redone": f"{summary.redone:,}" if summary.redone else "",
    }
    best = summary.best or {}
    value = number(best.get("value"))
    if value is not None and not best_apart:
        found[f"best {text(best.get('metric'))}, step {text(best.get('step'))}"] = f"{value:.4f}"
    return {name: words for name, words in found.items() if words}


def _large(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def _spelled(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def clock(seconds: float) -> str:
    """Write a duration in the two units that matter: 42 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _answers(summary: Summary) -> str:
    if not summary.samples and not summary.drawn:
        return "<h2>Answers</h2><p class=sub>The recipe has no chat_eval.prompts.</p>"
    parts = ["<h2>Answers before, during and after</h2>", tables.answer_moments(summary.samples)]
    if summary.drawn:
        parts += ["<h2>Answers drawn at a temperature</h2>", tables.answer_moments(summary.drawn)]
    return "".join(parts)


def _evaluations(folder: RunFolder) -> str:
    """Show the last answers to held-out rows beside what the rows say."""
    lines = [line for line in read_jsonl(folder.evaluations) if isinstance(line, dict)]
    if not lines:
        return ""
    last = [line for line in lines if line.get("step") == lines[-1].get("step")]
    parts = []
    for line in last[:ROWS_ANSWERED]:
        answers = {"in the row": str(line.get("wanted")), "the model's": str(line.get("answer"))}
        parts.append(tables.answer_moments({str(line.get("prompt")): answers}))
    title = f"Held-out rows answered, step {text(lines[-1].get('step'))}"
    return f"<h2>{title}</h2>{''.join(parts)}"


def _benchmarks(folder: RunFolder) -> str:
    files = sorted((folder.path / "evaluations").glob("*.json"))[-FILES:]
    names = [f"evaluations/{file.name}" for file in files]
    return tables.benchmark_table({name: lenient(folder, name) for name in names})


def _data(rows: Event) -> str:
    if not rows:
        return ""
    content = {key: value for key, value in rows.items() if key != "places"}
    places = rows.get("places")
    if isinstance(places, dict):
        content |= {f"first {key}": value[:3] for key, value in places.items() if value}
    return f"<h2>Data, first epoch</h2>{tables.pairs(content)}"


def _recipe(folder: RunFolder) -> str:
    if not folder.recipe.is_file():
        return ""
    content = folder.recipe.read_text(encoding="utf-8", errors="replace")
    try:
        content = dump_changes(Recipe.model_validate(yaml.safe_load(content)))
    except (ValueError, yaml.YAMLError):  # of another version, or edited: as it is
        return f"<h2>Recipe</h2><pre>{text(content)}</pre>"
    note = "<p class=sub>What it sets; recipe.yaml in the run folder has every field.</p>"
    return f"<h2>Recipe</h2>{note}<pre>{text(content)}</pre>"
