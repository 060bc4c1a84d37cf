"""Benchmarks of a trained result: `raytune-ft eval PATH --tasks arc_easy,...`.

What chat opens, asked by lm-evaluation-harness; a table out, and a JSON file beside the weights.
Tasks are the harness's own, whose rows come from the hub, or YAML files in a folder of the user's
with rows on this machine. No code of a model or data set is run; a task's YAML file may name
Python functions that lie beside it, so take folders of tasks from people you trust.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raytune_ft import __version__
from raytune_ft.errors import DataError, RecipeError

BOOTSTRAPS = 1000
"""Samples for standard errors that have no formula; the harness's 100,000 take minutes."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    shots: int | None = None
    """Examples before each question; None: as the task says."""
    limit: int | None = None
    """Questions per task; None: all."""
    chat_template: bool = False
    seed: int = 0


def evaluate(
    path: str, wanted: Wanted, *, bits: int | None = None, out: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate what is at `path`; return the record and the file that it was written to.

    Args:
        path: a run, adapter, merged or plain model folder, as `raytune-ft chat` takes it.
        wanted: tasks and how they are asked.
        bits: 4, 8, 16 or 32; None: the precision that training saw.
        out: the JSON file; None: `evaluations/` in the run or model folder.

    Raises:
        RecipeError: lm-eval is not installed, or there is no such task.
        DataError: a task's rows cannot be read.
        CheckpointError, ModelError: there is no model at `path`.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError("eval: needs lm-eval; pip install 'raytune_ft[eval]'")
    from raytune_ft.chat.source import find_source

    source = find_source(path, bits)
    target = Path(out).expanduser() if out else default_target(path)
    manager = find_tasks(wanted)
    from raytune_ft.chat.model import load_source
    from raytune_ft.evaluate.harness import HarnessModel

    chat = load_source(source, log=_tell)
    measured = _run(HarnessModel(chat, _Progress(), wanted.seed), wanted, manager)
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {
        "path": path,
        "created": created,
        "version": __version__,
        "lm_eval": version("lm_eval"),
        "quantization": source.section.quantization,
        "shots": wanted.shots,
        "limit": wanted.limit,
        "chat_template": wanted.chat_template,
        "seed": wanted.seed,
        **{key: measured[key] for key in ("results", "n-samples", "versions")},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, ensure_ascii=False, indent=1, default=str) + "\n")
    return json.loads(target.read_text()), target


def default_target(path: str) -> Path:
    """Name the file for results: in the run, else in the folder itself, else here."""
    now = datetime.now().astimezone()
    folder = Path(path).expanduser()
    if (folder.parent / "run.json").is_file():
        folder = folder.parent
    if not folder.is_dir():
        folder = Path()
    return folder / "evaluations" / f"{now:%Y%m%d_%H%M%S}.json"


def find_tasks(wanted: Wanted) -> Any:
    """Return the harness's index of tasks, of the user's folder alone where that is enough.

    Raises:
        RecipeError: there is no such folder or task; the nearest names are told.
    """
    folder = Path(wanted.include_path).expanduser() if wanted.include_path else None
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--include-path: no folder {wanted.include_path}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = None
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(wanted.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder) if folder else None)
    for name in wanted.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"nearest: {', '.join(near)}" if near else "see lm-eval ls tasks"
            raise RecipeError(f"--tasks: no task '{name}' among {len(manager.all_tasks):,}; {hint}")
    return manager


def rows_of(record: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Return (task, metric, value, standard error) of a record's results."""
    rows = []
    for task, found in record["results"].items():
        for key, value in found.items():
            name, _, kind = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name.endswith("_stderr") or not kind:
                continue
            error = found.get(f"{name}_stderr,{kind}")
            shown = name if kind == "none" else f"{name} ({kind})"
            rows.append((task, shown, float(value), error if isinstance(error, float) else None))
    return rows


def _run(model: Any, wanted: Wanted, manager: Any) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import simple_evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of the harness's bootstraps
    try:
        measured: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=list(wanted.tasks),
            num_fewshot=wanted.shots,
            limit=wanted.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=wanted.chat_template,
            task_manager=manager,
            random_seed=wanted.seed,
        )
    except (DatasetsError, ConnectionError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tasks {','.join(wanted.tasks)}: rows cannot be read ({reason}); without a network "
            "use tasks with local rows, by --include-path"
        ) from None
    return measured


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


class _Progress:
    """Prints how far each kind of question is, every tenth."""

    def __init__(self) -> None:
        self.told: tuple[str, int] = ("", 0)

    def __call__(self, kind: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if (kind, tenth) != self.told:
            self.told = (kind, tenth)
            _tell(f"{kind} {done:,} of {total:,}")


def split_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return task names given one by one or with commas; RecipeError if there is none."""
    names = tuple(name.strip() for word in tasks for name in word.split(",") if name.strip())
    if not names:
        raise RecipeError("--tasks: name at least one, such as arc_easy")
    return names
