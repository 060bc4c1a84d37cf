"""Preparation: what a run is told, and what ends it before a worker starts. Few rows, so no Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data.places import iter_packs
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.screen import Screen
from raytune_ft.training.run_folder import RunFolder, read_json
from tests.data.conftest import chat, write_jsonl
from tests.data.feeds import content


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
    assert re.sub(r":\d\)$", ":1)", str(caught.value)) == expected
    assert not (tmp_path / "run").exists()


def test_no_held_out_row_to_judge_is_told_before_training(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"messages": chat("Q", " ")}] * 2)
    with pytest.raises(DataError, match=r"^data\.validation: none of 2 rows can be trained on: 2"):
        prepared(tmp_path, tiny_model, chats, data={"validation": str(held_out)})
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
def test_the_record_tells_of_every_row_and_token(
    tiny_model: Path, chats: Path, tmp_path: Path, compat: str | None
) -> None:
    made = prepared(tmp_path, tiny_model, chats, data={"compat": compat, "validation": 0.2})
    record = read_json(tmp_path / "run/data.json")
    packs = [placed.pack for placed in iter_packs(made.train.feed, epochs=1)]
    tokens = sum(len(pack.input_ids) for pack in packs)
    assert (record["packs"], record["exact"]) == (len(packs), True)
    assert record["density"] == pytest.approx(tokens / (len(packs) * 96), abs=1e-4)
    assert record["rows"] == record["used"] == len(made.train.feed.source)
    assert json.dumps(record)
    assert record["formats"] == ["openai (by column messages)"]
    if compat is None:
        assert record["tokens"] == tokens
        assert record["targets"] == sum(pack.n_targets for pack in packs)
    assert made.validation is not None
    assert made.validation.feed.plan is None and (made.train.feed.plan is None) == (compat is None)


def test_the_windows_of_the_estimate_are_handed_on(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    made = prepared(tmp_path, tiny_model, chats, data={"window": 8}, train={"epochs": 3}).train
    assert made.epochs == 3
    assert len(made.made) == 2 < made.feed.n_windows
    for number, window in enumerate(made.made):
        expected = made.feed.window(0, number)
        assert [content(pack) for pack in window.packs] == [content(p) for p in expected.packs]
    assert read_json(tmp_path / "run/data.json")["exact"] is False
