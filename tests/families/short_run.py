"""One real training run in this process: rows, template, packs, loop, adapter; no Ray.

Rows below 2000 are counted in this process by `preparation.prepare` itself; packs come from
`places.iter_packs`, which is what the data tasks of Ray call.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from raytune_ft.config import catalog
from raytune_ft.config.schema import Recipe
from raytune_ft.data.places import iter_packs
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.screen import Screen
from raytune_ft.training import worker
from raytune_ft.training.run_folder import RunFolder
from tests.families.checkpoints import SPECS

ROWS = (
    ("what is the red stone?", "the red stone is by the river."),
    ("今天的天气怎么样", "天气的天是红色的"),
    ("write a function", "def answer(question):\n    return question + 1"),
    ("and the seventh song?", "the song of the night."),
)
STEPS = 5


def write_rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ROWS
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return file


def recipe_of(family: str, model: Path, folder: Path, **model_fields: Any) -> Recipe:
    """Return a recipe of five steps, each of which sees every row; template as the card says."""
    card = catalog.card(SPECS[family].card)
    section = {"path": str(model), "template": card.template, "eos_token": card.eos_token}
    return Recipe.model_validate(
        {
            "model": section | {"quantization": "nf4"} | model_fields,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
            "data": {"sources": [{"path": str(write_rows(folder))}], "max_length": 512},
            "train": {
                "epochs": STEPS, "micro_batch_size": 1, "accumulation": 1, "lr": 1e-2,
                "scheduler": "constant", "deepspeed": "none", "log_every": 1,
            },
            "chat_eval": {"every": None, "prompts": ["what is red?"], "max_new_tokens": 4},
            "run": {"name": family, "storage": str(folder / "runs"), "trackers": []},
        }
    )  # fmt: skip


def train(recipe: Recipe) -> tuple[RunFolder, Prepared]:
    """Run a recipe to the end; return its folder and what it was prepared with."""
    folder = RunFolder(Path(recipe.run.storage) / str(recipe.run.name))
    prepared = prepare(recipe, folder, "family test", silent_screen())
    feed = prepared.train.feed
    worker.run(
        # one thread: for matrices this small, threads that wait for each other cost most
        replace(prepared.job, sharing=os.cpu_count() or 1),
        lambda start: iter_packs(feed, start),
        None,
        lambda _event: None,
    )
    folder.update(status="done")
    return folder, prepared


def silent_screen() -> Screen:
    return Screen(1, console=Console(file=io.StringIO()))
