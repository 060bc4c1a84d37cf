"""Sweep folders as a sweep leaves them, made without training: for what reads them afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping.trials import FOLDER, Ledger, name_of
from raytune_ft.training.run_folder import RunFolder

SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-5, "high": 1e-2, "log": 1},
    "lora.r": [4, 8, 16, 32],
    "lora.alpha": "2 * lora.r",
    "train.scheduler": ["cosine", "linear"],
    "lora.dropout": {"low": 0.0, "high": 0.2},
}


def recipe_of(space: dict[str, Any] | None = None, **tune: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "models/tiny"},
            "data": {"sources": [{"path": "rows.jsonl"}], "validation": 0.1},
            "run": {"name": "demo"},
            "tune": {"space": space or SPACE, "metric": "val_loss", **tune},
        }
    )


def draw(random: np.random.Generator) -> dict[str, Any]:
    """Values of one trial of `SPACE`."""
    r = int(random.choice([4, 8, 16, 32]))
    return {
        "train.lr": float(10 ** random.uniform(-5, -2)), "lora.r": r, "lora.alpha": 2 * r,
        "train.scheduler": str(random.choice(["cosine", "linear"])),
        "lora.dropout": float(random.uniform(0, 0.2)),
    }  # fmt: skip


def make_sweep(
    place: Path,
    n: int = 16,
    *,
    steps: int = 60,
    status: str = "done",
    values: list[dict[str, Any]] | None = None,
    reason: str = "step 13: loss is nan; lower train.lr",
    running: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    **info: Any,
) -> RunFolder:
    """Write a sweep's folder: a valley over the learning rate, worse half stopped, one failed.

    Args:
        place: its path.
        n: trials.
        steps: of a trial that runs to its end.
        status: as run.json says it.
        values: of each trial; None: drawn from `SPACE`.
        reason: why the last trial but those that run failed; empty: none did.
        running: trials at the end that are not over.
        seed: of values and figures.
        recipe: of the sweep.
        info: further fields of run.json.
    """
    folder, random = RunFolder(place), np.random.default_rng(seed)
    chosen = values or [draw(random) for _ in range(n)]
    about = {"source": "quickstart_tune.yaml", "model_folder": "models/tiny", **info}
    folder.create(place.name, loader.dump_yaml(recipe or recipe_of()), **about)
    folder.update(status=status)
    ledger = Ledger(folder.path)
    ledger.planned(chosen)
    depths = [_depth(each) for each in chosen]
    middle = float(np.median(depths)) if depths else 0.0
    for number, depth in enumerate(depths):
        ledger.started(number)
        is_running = number >= len(chosen) - running
        is_lost = bool(reason) and number == len(chosen) - running - 1
        is_stopped = not is_lost and depth > middle
        last = steps // 4 if is_stopped or is_lost else steps // 2 if is_running else steps
        held_out = write_metrics(folder.path / FOLDER / name_of(number), last, steps, depth, random)
        if is_running:
            continue
        event = "failed" if is_lost else "stopped" if is_stopped else "done"
        ledger.ended(
            event, number, metric=None if is_lost else held_out, step=last, seconds=1.8 * last,
            reason=reason if is_lost else None,
        )  # fmt: skip
    return folder


def _depth(values: dict[str, Any]) -> float:
    lr, r = values.get("train.lr"), values.get("lora.r")
    valley = (math.log10(lr) + 3.5) ** 2 if isinstance(lr, float) else 0.5
    return 0.25 * valley + (0.3 / math.log2(r) if isinstance(r, int) and r > 1 else 0.3)


def write_metrics(
    place: Path, last: int, total: int, depth: float, random: np.random.Generator
) -> float:
    """Write a trial's metrics.jsonl; return its last held-out loss."""
    place.mkdir(parents=True)
    held_out = math.nan
    with (place / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, last + 1):
            share = step / total
            loss = 0.9 + depth + 1.6 * math.exp(-5 * share) + 0.04 * random.standard_normal()
            measured = None
            if step % max(1, total // 8) == 0 or step == last:
                held_out = measured = 1.0 + depth + 1.5 * math.exp(-5 * share)
            line = {
                "step": step, "total": total, "exact": True, "share": share, "loss": loss,
                "val_loss": measured, "lr": 1e-4 * (1 - share), "seconds": 1.8,
                "tokens_per_s": 16_000 + 100 * random.standard_normal(), "rows": [1, 2, 3],
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return held_out
