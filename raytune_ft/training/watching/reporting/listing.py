"""Listing: a folder of runs in, what is known of each out, newest first.

A folder that is damaged or half written is listed with a remark; nothing here raises for what
stands in one. `summary.json`, which the report leaves, spares reading the steps of an old run
again as long as they have not changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_ft.errors import CheckpointError
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl, write_json
from raytune_ft.training.watching.reporting.series import Columns, number
from raytune_ft.training.watching.reporting.summary import Summary, lenient, summarize

SUMMARY = "summary.json"
FIGURES = ("steps", "total", "loss", "val_loss", "best", "best_step", "tokens_per_s", "seconds")
METHODS = {"nf4": "qlora", "int8": "int8 lora", "none": "lora"}
TRACES = ("metrics.jsonl", "recipe.yaml", "checkpoints")
"""What makes a folder without run.json a damaged run rather than something else."""


@dataclass(frozen=True)
class Entry:
    """One run of a list; None is what is not known."""

    name: str
    path: str
    status: str
    """running, done, failed, stopped, interrupted (its process is gone), or damaged."""
    resumable: bool
    """Whether `--resume` has a checkpoint to go on from, and something left to do."""
    model: str
    method: str
    steps: int
    total: int | None
    loss: float | None
    val_loss: float | None
    best: float | None
    """Of the metric that the recipe's `eval.metric` names."""
    best_step: int | None
    tokens_per_s: float | None
    seconds: float
    """Of optimizer steps."""
    created: str
    remark: str
    """What is odd about it; empty if nothing is."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def list_runs(folder: Path) -> list[Entry]:
    """Return the runs of a folder, newest first; of a run's own folder, that one.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; runs stand under run.storage, by default ./runs"
        )
    found = [entry_of(RunFolder(place)) for place in _places(folder)]
    return sorted(found, key=lambda entry: (entry.created, entry.name), reverse=True)


def _places(folder: Path) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
        return
    for place in sorted(folder.iterdir()):
        if place.is_dir() and (
            (place / "run.json").is_file() or any((place / one).exists() for one in TRACES)
        ):
            yield place


def entry_of(folder: RunFolder) -> Entry:
    """Say what a run folder tells."""
    info, figures = lenient(folder, "run.json"), figures_of(folder)
    status = status_of(folder, info)
    checkpoints = folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step_*"))
    model = str(info.get("model_folder") or "")
    quantization, method = str(info.get("quantization", "none")), str(info.get("method", ""))
    return Entry(
        name=str(info.get("name", folder.path.name)),
        path=str(folder.path),
        status=status,
        resumable=checkpoints and status in ("stopped", "interrupted", "failed"),
        model=Path(model).name,
        method=METHODS.get(quantization, method) if method == "lora" else method,
        created=str(info.get("created", "")),
        remark=_remark(folder, info, figures, status),
        **{name: figures.get(name) for name in FIGURES if name not in ("steps", "seconds")},
        steps=int(figures["steps"]),
        seconds=float(figures["seconds"]),
    )


def status_of(folder: RunFolder, info: Event) -> str:
    """Return a run's status; `damaged` where run.json is missing or no record of a run."""
    if not isinstance(info.get("status"), str):
        return "damaged"
    try:
        return folder.status()
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return "damaged"


def _remark(folder: RunFolder, info: Event, figures: Event, status: str) -> str:
    if not folder.run_json.is_file():
        return "no run.json"
    if not info:
        return "run.json is not readable"
    if status == "damaged":
        return "run.json is of no run"
    if figures["broken"]:
        return f"metrics.jsonl is cut short behind step {figures['steps']}"
    if not figures["steps"] and status == "done":
        return "no steps in metrics.jsonl"
    return "no step yet" if not figures["steps"] else ""


def figures_of(folder: RunFolder) -> Event:
    """Return a run's figures, from summary.json if metrics.jsonl is as it was then."""
    try:
        size = folder.metrics.stat().st_size
    except OSError:
        size = 0
    known = lenient(folder, SUMMARY)
    if known.get("metrics_bytes") == size and _is_ours(known):
        return known
    columns = Columns(read_jsonl(folder.metrics))
    return figures_from(folder, columns, summarize(folder, columns))


def _is_ours(known: Event) -> bool:
    needed = (known.get(name) for name in ("steps", "seconds", "broken"))
    others = (known[name] for name in FIGURES if known.get(name) is not None)
    return all(isinstance(value, (int, float)) for value in (*needed, *others))


def figures_from(folder: RunFolder, columns: Columns, summary: Summary) -> Event:
    """Return what a list shows of a run whose steps were read."""
    best = summary.best or {}
    size = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
    return {
        "steps": summary.steps,
        "total": columns.total,
        "loss": columns.last("loss"),
        "val_loss": summary.val_loss,
        "best": number(best.get("value")),
        "best_step": best.get("step"),
        "tokens_per_s": summary.speed,
        "seconds": summary.seconds,
        "metrics_bytes": size,
        "broken": _is_broken(folder),
    }


def _is_broken(folder: RunFolder) -> bool:
    """Tell whether metrics.jsonl ends within a line, as one that is being written never does."""
    if not folder.metrics.is_file() or not folder.metrics.stat().st_size:
        return False
    with folder.metrics.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def keep_figures(folder: RunFolder, columns: Columns, summary: Summary) -> None:
    """Write summary.json."""
    write_json(folder.path / SUMMARY, figures_from(folder, columns, summary))
