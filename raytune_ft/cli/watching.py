"""Verbs about runs that were made: list them, lay them over each other, write a report again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raytune_ft.cli.app import Json, Run, verb
from raytune_ft.entry import tell
from raytune_ft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from raytune_ft.training.run_folder import RunFolder
    from raytune_ft.training.watching.reporting.listing import Entry

NOTHING_FOUND = 1
STORAGE = "runs"
HEAD = (
    "name", "status", "model", "method", "step", "loss", "val loss", "best", "tok/s", "time",
    "created", "seen", "trials",
)  # fmt: skip
STATUSES = ("running", "done", "failed", "stopped", "interrupted", "damaged")
ORDERS = ("created", "name", "status", "step", "loss", "val_loss", "best", "tokens_per_s", "seen")
FALLING = ("created", "step", "tokens_per_s")
"""Orders that begin with the largest."""

Storage = Annotated[
    str,
    typer.Argument(metavar="[FOLDER]", help="Folder of runs, or s3://BUCKET/RUNS: run.storage."),
]
Status = Annotated[
    list[str] | None,
    typer.Option("--status", help=f"Only such: {', '.join(STATUSES)}; repeatable."),
]
Sort = Annotated[str, typer.Option("--sort", help=f"By {', '.join(ORDERS)}.")]
Several = Annotated[
    list[str], typer.Argument(metavar="RUN RUN...", help="Run folders, or their names under runs/.")
]
HtmlOut = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write a page of curves as well.")
]


@verb("runs")
def runs(
    folder: Storage = STORAGE,
    status: Status = None,
    sort: Sort = "created",
    as_json: Json = False,
) -> int:
    """List runs: status, steps, losses, last sign of life; tab-separated where piped."""
    for option, words, known in (("--status", status or [], STATUSES), ("--sort", [sort], ORDERS)):
        for word in words:
            _check_word(option, word, known)
    listed = _listed(folder)
    found = _ordered([one for one in listed if not status or one.status in status], sort)
    if as_json:
        print(json.dumps([entry.to_json() for entry in found], ensure_ascii=False, indent=2))
    elif not found:
        tell(
            f"{folder}: none of its {len(listed)} runs is {' or '.join(status or [])}"
            if listed
            else f"{folder}: holds no run; raytune-ft train makes one"
        )
    elif sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_runs(HEAD, [_cells(entry) for entry in found], _remarks(found))
    else:
        _print_tabbed([(*HEAD, "remark"), *((*_cells(one), one.remark) for one in found)])
    return 0 if found or as_json else NOTHING_FOUND


def _check_word(option: str, word: str, known: Sequence[str]) -> None:
    from raytune_ft.config.document import nearest

    if word not in known:
        near = nearest(word, list(known))
        hint = f"did you mean '{near}'?" if near else f"choose: {', '.join(known)}"
        raise RecipeError(f"{option}: no '{word}'; {hint}")


def _listed(folder: str) -> list[Entry]:
    from raytune_ft.storing.places import is_elsewhere, local_path
    from raytune_ft.training.watching.reporting.listing import list_runs

    if not is_elsewhere(folder):
        return list_runs(local_path(folder) if "://" in folder else Path(folder).expanduser())
    from raytune_ft.lookout.elsewhere import list_elsewhere

    return list_elsewhere(folder)


def _ordered(found: list[Entry], by: str) -> list[Entry]:
    """Put runs in order; those of which the figure is not known stand last."""
    if by == "created":
        return found
    field = {"step": "steps"}.get(by, by)
    known = [entry for entry in found if getattr(entry, field) is not None]
    known.sort(key=lambda entry: getattr(entry, field), reverse=by in FALLING)
    return known + [entry for entry in found if getattr(entry, field) is None]


def _cells(entry: Entry) -> tuple[str, ...]:
    from raytune_ft.lookout.tail import clean
    from raytune_ft.training.watching.reporting import clock, sweeps

    best = "" if entry.best is None else f"{entry.best:.4f} @{entry.best_step}"
    total = entry.total if entry.total is not None else "?"
    steps = f"{entry.steps}/{total}" if entry.steps else "0"
    cells = (
        entry.name,
        entry.status + (" (resumable)" if entry.resumable else ""),
        entry.model,
        entry.method,
        steps if entry.trials is None else sweeps.progress(entry.trials),
        _figure(entry.loss, ".4f"),
        _figure(entry.val_loss, ".4f"),
        best,
        _figure(entry.tokens_per_s, ",.0f"),
        clock(entry.seconds) if entry.seconds else "",
        entry.created[:16].replace("T", " "),
        f"{clock(entry.seen)} ago" if entry.seen is not None else "",
        sweeps.as_words(entry.trials) if entry.trials is not None else "",
    )
    return tuple(map(clean, cells))


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _remarks(found: Sequence[Entry]) -> list[str]:
    from raytune_ft.lookout.tail import clean

    return [clean(f"{entry.name}: {entry.remark}") for entry in found if entry.remark]


def _print_tabbed(rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        print("\t".join(" ".join(cell.split()) for cell in row))


@verb("compare")
def compare(names: Several, html: HtmlOut = None, as_json: Json = False) -> int:
    """Lay runs over each other: recipe fields that differ, final figures, and --html curves."""
    from raytune_ft.training.watching.reporting import comparison

    if len(names) < 2:
        raise RecipeError(f"compare: name two runs or more; raytune-ft runs {STORAGE} lists them")
    found = comparison.compare([_folder(name) for name in names])
    if html is not None:
        _write(Path(html).expanduser(), comparison.compare_page(found))
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
        return 0
    figures = [[field, *words] for field, words in found.figures.items()]
    fields = [[field, *words] for field, words in found.recipe.items()]
    if sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_comparison(found.names, figures, fields)
    else:
        _print_tabbed([["", *found.names], *figures, *fields])
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _folder(name: str) -> RunFolder:
    """Open a run by its path, its name under runs/ or its address; damaged ones here as well."""
    from raytune_ft.storing.places import is_elsewhere
    from raytune_ft.training.run_folder import RunFolder

    if is_elsewhere(name):
        from raytune_ft.storing import fetching  # a second of imports

        return fetching.run_folder(name)
    for place in (Path(name).expanduser(), Path(STORAGE) / name):
        if (place / "run.json").is_file() or (place / "metrics.jsonl").is_file():
            return RunFolder(place)
    raise CheckpointError(f"{name}: no run folder here or under {STORAGE}/; raytune-ft runs lists")


def _write(target: Path, content: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecipeError(f"--html: {target} cannot be written: {error.strerror}") from None
    print(target, file=sys.stderr)


@verb("report")
def report(run: Run) -> None:
    """Write a run's report.html, or a sweep's page, again: of one that goes on, or was killed."""
    from raytune_ft.sweeping import page
    from raytune_ft.training.watching.reporting import write_report

    folder = _folder(run)
    print(page.write_page(folder) if page.is_sweep(folder) else write_report(folder))
