"""Listing: a folder of runs in, what is known of each out, newest first.

Runs that are kept elsewhere are listed by `lookout.elsewhere`, of the same parts.

A folder that is damaged or half written is listed with a remark; nothing here raises for what
stands in one. `summary.json`, which the report leaves, spares reading the steps of an old run
again as long as they have not changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.errors import CheckpointError
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl, write_json
from raytune_ft.training.watching.reporting import sweeps
from raytune_ft.training.watching.reporting.series import Columns, number
from raytune_ft.training.watching.reporting.summary import Summary, lenient, summarize

SUMMARY = "summary.json"
FIGURES = ("steps", "total", "loss", "val_loss", "best", "best_step", "tokens_per_s", "seconds")
METHODS = {"nf4": "qlora", "int8": "int8 lora", "none": "lora"}
SIGNS = ("run.json", "metrics.jsonl", "lines.log", "alive.json", sweeps.LEDGER)
"""Files whose last change is a sign of life."""
GOES_ON = ("stopped", "interrupted", "failed")
"""Statuses with something left to do."""
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
    seen: float | None = None
    """Seconds since its last sign of life."""
    trials: dict[str, int] | None = field(default=None)
    """Of a sweep: how many are done, running and so on; None: it is none."""

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
    return newest_first(entry_of(RunFolder(place)) for place in _places(folder))


def newest_first(found: Iterable[Entry]) -> list[Entry]:
    """Order runs as they are listed."""
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
    trials = sweeps.trials_of(folder, runs=status == "running")
    checkpoints = folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step_*"))
    return compose(
        info,
        figures,
        status,
        name=folder.path.name,
        path=str(folder.path),
        resumable=(checkpoints or trials is not None) and status in GOES_ON,
        remark=remark_of(
            info, figures, status, is_there=folder.run_json.is_file(), is_sweep=trials is not None
        ),
        seen=age(_changed(folder.path / name) for name in SIGNS),
        trials=trials,
    )


def compose(
    info: Event,
    figures: Event,
    status: str,
    *,
    name: str,
    path: str,
    resumable: bool,
    remark: str,
    seen: float | None,
    trials: dict[str, int] | None,
) -> Entry:
    """Put together what is known of a run.

    Args:
        info: its run.json, or an empty object.
        figures: as `figures_from` has them.
        status: of `Entry`.
        name: where run.json has none.
        path: folder or address.
        resumable: of `Entry`, and so on.
    """
    model = str(info.get("model_folder") or "")
    quantization, method = str(info.get("quantization", "none")), str(info.get("method", ""))
    return Entry(
        name=str(info.get("name", name)),
        path=path,
        status=status,
        resumable=resumable,
        model=Path(model).name,
        method=METHODS.get(quantization, method) if method == "lora" else method,
        created=str(info.get("created", "")),
        remark=remark,
        **{key: figures.get(key) for key in FIGURES if key not in ("steps", "seconds")},
        steps=int(figures["steps"]),
        seconds=float(figures["seconds"]),
        seen=seen,
        trials=trials,
    )


def age(changes: Iterable[float | None]) -> float | None:
    """Return the seconds since the last of some moments, given in seconds since 1970."""
    last = max((moment for moment in changes if moment is not None), default=None)
    return None if last is None else max(0.0, time.time() - last)


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def status_of(folder: RunFolder, info: Event) -> str:
    """Return a run's status; `damaged` where run.json is missing or no record of a run."""
    if not isinstance(info.get("status"), str):
        return "damaged"
    try:
        return folder.status()
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return "damaged"


def remark_of(info: Event, figures: Event, status: str, *, is_there: bool, is_sweep: bool) -> str:
    """Say what is odd about a run.

    Args:
        info: its run.json, or an empty object.
        figures: as `figures_from` has them.
        status: of `Entry`.
        is_there: whether there is a run.json, readable or not.
        is_sweep: whether trials have the steps.
    """
    told = (
        (not is_there, "no run.json"),
        (not info, "run.json is not readable"),
        (status == "damaged", "run.json is of no run"),
        (figures.get("broken"), f"metrics.jsonl is cut short behind step {figures['steps']}"),
        (is_sweep or figures["steps"], ""),
        (status == "done", "no steps in metrics.jsonl"),
        (True, "no step yet"),
    )
    return next(words for holds, words in told if holds)


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
