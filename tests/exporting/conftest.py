"""Finished runs on the tiny model, made once: what export and merge read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.training.run_folder import RunFolder
from tests.conftest import write_chats
from tests.training.test_method_runs import recipe_of, train


@dataclass(frozen=True)
class Made:
    """A run, its base and its rows."""

    run: RunFolder
    base: Path
    rows: Path

    @property
    def words(self) -> str:
        return str(self.run.path)


def made(place: Path, base: Path, **changes: dict[str, Any]) -> Made:
    place.mkdir(parents=True)
    rows, held_out = (
        write_chats(place / name, n) for name, n in (("rows.jsonl", 30), ("v.jsonl", 6))
    )
    data = {"validation": str(held_out), **changes.pop("data", {})}
    lora = {"r": 4, "alpha": 64, "dropout": 0.0, **changes.pop("lora", {})}
    recipe = recipe_of(base, rows, data=data, lora=lora, **changes)
    run = train(recipe, place / "run")
    run.update(status="done")
    return Made(run, base, rows)


@pytest.fixture(scope="session")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """LoRA on float weights."""
    return made(tmp_path_factory.mktemp("plain") / "it", tiny_model)


@pytest.fixture(scope="session")
def on_nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """QLoRA with another template than the base's own, and a system text."""
    model = {"quantization": "nf4", "template": "internlm_chat"}
    return made(tmp_path_factory.mktemp("nf4") / "it", tiny_model, model=model)


def content_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
