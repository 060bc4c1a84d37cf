"""Run folders as training leaves them, made without training: for what reads them afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.training.run_folder import RunFolder, append_jsonl, write_json

GIB = 2**30


def recipe_of(name: str = "demo", **changes: dict[str, Any]) -> Recipe:
    body: dict[str, Any] = {
        "model": {"path": "models/tiny"},
        "data": {"sources": [{"path": "rows.jsonl"}], "max_length": 512},
        "train": {"epochs": 3, "lr": 2e-4},
        "run": {"name": name, "trackers": []},
    }
    for section, values in changes.items():
        body[section] = {**body.get(section, {}), **values}
    return Recipe.model_validate(body)


def step_line(step: int, total: int, random: np.random.Generator, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as the loop writes it."""
    seconds = float(1.8 * random.lognormal(0, 0.08))
    tokens = int(random.integers(28_000, 32_768))
    share = step / total
    return {
        "step": step, "epoch": min(2, int(share * 3)), "progress": 3 * share, "share": share,
        "total": total, "exact": True,
        "loss": float(1.1 + 1.4 * math.exp(-6 * share) + 0.12 * random.standard_normal()),
        "lr": 2e-4 * 0.5 * (1 + math.cos(math.pi * share)),
        "grad_norm": float(random.lognormal(-0.5, 0.4)), "overflows": 0, "tokens": tokens,
        "targets": tokens // 3, "seconds": seconds, "data_seconds": 0.01 * seconds,
        "rank_seconds": [seconds * 0.93, seconds * 0.97], "eta_seconds": (total - step) * 1.8,
        "tokens_per_s": tokens / seconds, "targets_per_s": tokens / 3 / seconds,
        "mfu": 0.38 / seconds * 1.8, "data_wait": 0.01, "memory_gib": min(21.4, 20 + step / 10),
        "memory_reserved_gib": 23.9, "memory_device_gib": 25.1, "rss_gib": 6.0,
        "rows": random.integers(0, 9_999, 40).tolist(), "val_loss": None, **changes,
    }  # fmt: skip


def make_run(
    place: Path,
    *,
    steps: int = 60,
    total: int | None = None,
    status: str = "done",
    recipe: Recipe | None = None,
    every: int = 10,
    answers: dict[str, list[str]] | None = None,
    seed: int = 0,
    **info: Any,
) -> RunFolder:
    """Write a run folder.

    Args:
        place: its path, whose last part is its name.
        steps: lines of metrics.jsonl.
        total: steps of the whole run.
        status: as run.json says it.
        recipe: of the run.
        every: steps between validations.
        answers: prompt -> answers before, at two steps, and after.
        seed: of the figures.
        info: further fields of run.json.
    """
    folder, random = RunFolder(place), np.random.default_rng(seed)
    recipe = recipe or recipe_of(place.name)
    about = {"source": "quickstart.yaml", "model_folder": "models/tiny", "method": "lora"}
    folder.create(place.name, loader.dump_yaml(recipe), **about)
    folder.update(status=status, **info)
    rows: dict[str, Any] = {"rows": 1000, "used": 996, "dropped": {"empty": 4}}
    rows |= {"cut": 0, "split": 0}
    rows["places"] = {"empty": ["rows:3"]}
    write_json(folder.path / "data.json", {**rows, "tokens": 1_800_000, "density": 0.97})
    with folder.metrics.open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            measured = 1.3 + math.exp(-5 * step / (total or steps)) if step % every == 0 else None
            more = {} if measured is None else {"val_loss": measured, "val_perplexity": 3.0}
            line = step_line(step, total or steps, random, **more)
            file.write(json.dumps(line) + "\n")
    moments = [(0, "before"), (steps // 3, "step"), (2 * steps // 3, "step"), (steps, "after")]
    for prompt, said in (answers or {}).items():
        for (step, when), answer in zip(moments, said, strict=True):
            fields = {"step": step, "when": when, "prompt": prompt, "answer": answer}
            append_jsonl(folder.samples, {**fields, "kind": "greedy"})
    return folder
