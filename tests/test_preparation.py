"""Preparation: what a run is told, and what ends it before a worker starts. Few rows, so no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.screen import Screen
from raytune_ft.training.run_folder import RunFolder, read_json
from tests.data.conftest import chat, write_jsonl


def prepared(folder: Path, model: Path, rows: Path, /, **changes: Any) -> Prepared:
    sections = {
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96},
        "train": {"accumulation": 4},
    }
    recipe = Recipe.model_validate(
        {key: {**sections.get(key, {}), **changes.get(key, {})} for key in {*sections, *changes}}
    )
    return prepare(
        recipe, RunFolder(folder / "run"), "test", Screen(1, console=Console(quiet=True))
    )


def test_no_row_to_train_on_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat("Q", " ")}] * 3
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tiny_model, data)
    expected = f"data.sources: none of 3 rows can be trained on: 3 empty ({data}:1)"
    assert str(caught.value) == expected
    assert not (tmp_path / "run").exists()


def test_mmlu_files_are_checked_first_and_travel_as_absolute_paths(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question = {"input": "1 + 1?", "output": "A", "subject": "astronomy"}
    write_jsonl(tmp_path / "good.jsonl", [question])
    write_jsonl(tmp_path / "bad.jsonl", [question, {**question, "output": "two"}])
    with pytest.raises(RecipeError, match=r"chat_eval\.mmlu\[1\]: no file none\.jsonl"):
        prepared(tmp_path, tiny_model, chats, chat_eval={"mmlu": ["good.jsonl", "none.jsonl"]})
    with pytest.raises(DataError, match=r"^bad\.jsonl:2: 'output' is 'two'"):
        prepared(tmp_path, tiny_model, chats, chat_eval={"mmlu": ["bad.jsonl"]})
    job = prepared(tmp_path, tiny_model, chats, chat_eval={"mmlu": ["good.jsonl"]}).job
    assert job.recipe["chat_eval"]["mmlu"] == [str(tmp_path / "good.jsonl")]
    written = load_recipe(str(tmp_path / "run/recipe.yaml"))
    assert written.chat_eval.mmlu == ["good.jsonl"]


@pytest.mark.parametrize("compat", [None, "xtuner-0.1.9"])
def test_the_record_accounts_for_every_token(
    tiny_model: Path, chats: Path, tmp_path: Path, compat: str | None
) -> None:
    made = prepared(tmp_path, tiny_model, chats, data={"compat": compat, "validation": 0.2})
    record = read_json(tmp_path / "run/data.json")
    lost = record.get("lost_tokens", 0)
    assert (lost > 0) == (compat is not None)
    in_packs = sum(
        int(piece[2] - piece[1])
        for window in range(made.train.plan.n_windows)
        for pieces in made.train.plan.window_pieces(0, window)
        for piece in pieces
    )
    assert in_packs + lost == record["tokens"]
    assert record["density"] == pytest.approx(in_packs / (record["packs"] * 96), abs=1e-4)
    assert json.dumps(record)
    assert record["formats"] == ["openai (by column messages)"]
    assert made.validation is not None
    assert made.validation.plan.isolated and made.train.plan.isolated == (compat is None)
