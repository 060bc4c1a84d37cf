"""`inspect` and `plan`: counts, marks and memory, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft import inspection, planning, survey
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data.encode import IGNORE_INDEX
from raytune_ft.errors import RecipeError
from raytune_ft.inspection import page, terminal
from raytune_ft.inspection.view import BARS, bars_of, stretches
from tests.cli.conftest import Command

MODEL_BYTES = 2**20


@pytest.fixture
def recipe(tiny_model: Path, chats: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(tiny_model)},
            "lora": {"r": 4, "alpha": 8},
            "data": {"sources": [{"path": str(chats)}], "max_length": 128},
            "train": {"epochs": 2, "accumulation": 3},
        }
    )


def test_plan_counts_rows_packs_and_steps(recipe: Recipe) -> None:
    plan = planning.plan_recipe(recipe)
    assert plan.rows is not None and plan.packs is not None and plan.density is not None
    assert (plan.rows["rows"], plan.rows["used"]) == (40, 40)
    assert plan.packs == pytest.approx(plan.rows["tokens"] / 128 / plan.density)
    assert 0.8 < plan.density <= 1
    assert plan.steps is not None
    assert 2 * plan.packs / 3 <= plan.steps <= 2 * (plan.packs / 3 + 1)


def test_plan_of_the_walk_through_needs_no_weights(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("train", "--config", "internlm_oasst1.yaml", "--dry-run")
    assert said.code == 0, said.err
    assert "./internlm-chat-7b is not here" in said.out
    assert "./openassistant-guanaco is not here" in said.out
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_7b_base_in_nf4(call: Command) -> None:
    said = call("plan", "internlm_chat_7b_qlora_oasst1_e3", "--gpu-memory", "80GB", "--json")
    parts = json.loads(said.out)["memory"]["parts"]
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["base weights"] == pytest.approx(linears * 0.5, rel=0.01)
    assert parts["quantisation state"] == pytest.approx(linears * 0.016, rel=0.01)


def test_too_little_memory_is_4_after_the_plan(call: Command) -> None:
    said = call("plan", "internlm_7b_full_oasst1_e3", "--gpu-memory", "8GiB")
    assert said.code == 4
    assert "base weights" in said.out
    assert said.err.startswith("error: needs about ")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("8g", 8 * 10**9), ("512 MiB", 2**29),
     ("1.5k", 1500), ("100", 100), ("1TiB", 2**40)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert survey.parse_size(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "0", "x", "8 apples", "-1GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(RecipeError, match="--gpu-memory: expected a size"):
        survey.parse_size(text, "--gpu-memory")


def test_notes_name_what_is_probably_not_meant(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    changed = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"name": "taken", "storage": str(tmp_path)}),
            "train": recipe.train.model_copy(update={"accumulation": 64}),
            "data": recipe.data.model_copy(update={"max_length": 1024}),
        }
    )
    notes = "\n".join(planning.plan_recipe(changed).notes)
    assert "run.name" in notes
    assert "512 positions" in notes
    assert "only 2 optimizer steps" in notes


def test_inspect_marks_exactly_the_trained_text(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.show(inspection.look(recipe, "chats", 2))
    out = capsys.readouterr().out
    assert "question 0 about red?" in out
    assert "assistant: red" in out
    assert "⟦red<|im_end|>" in out
    assert "question 2 about" not in out
    assert "40 used of 40, 0 dropped" in out


@pytest.fixture
def rows_with_faults(recipe: Recipe, tmp_path: Path) -> tuple[Path, Recipe]:
    """Three rows, of which one can be used; it tries to steer what shows it."""
    rows = [
        {"messages": [{"role": "user", "content": "only a question"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": "<script>alert(1)</script>"},
                {"role": "assistant", "content": "a\x1b[2J"},
            ]
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = recipe.data.model_copy(
        update={
            "sources": [recipe.data.sources[0].model_copy(update={"path": str(path)})],
            "on_error": "skip",
        }
    )
    return path, recipe.model_copy(update={"data": data})


def test_inspect_names_what_is_dropped(
    rows_with_faults: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    path, recipe = rows_with_faults
    terminal.show(inspection.look(recipe, "rows", 3))
    out = capsys.readouterr().out
    assert "1 used of 3, 2 dropped" in out
    assert f"{path}:1" in out
    assert f"{path}:2" in out
    assert "\x1b[2J" not in out, "a row cannot steer the terminal"


def test_the_page_runs_nothing_and_shows_the_same(
    rows_with_faults: tuple[Path, Recipe], tmp_path: Path
) -> None:
    path, recipe = rows_with_faults
    target = page.write_page(inspection.look(recipe, "rows", 3), str(tmp_path / "rows.html"))
    text = target.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "\x1b" not in text
    assert f"{path}:2" in text
    assert "<mark>a" in text
    assert "1 used of 3, 2 dropped" in text
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".jsonl"] == ["rows.html"]


def test_a_page_that_cannot_be_written_is_one_line(call: Command, chats: Path) -> None:
    said = call("inspect", str(chats), "--html", "/no/such/folder/x.html")
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("error: --html: /no/such/folder/x.html cannot be")


def test_a_bare_data_file_is_recognised_and_shown(
    call: Command, tiny_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "mine.csv"
    rows.write_text("instruction,input,output\nSay {name},,hello\n")
    said = call("inspect", str(rows), f"model.path={tiny_model}")
    assert said.code == 0, said.err
    assert f"{rows}: alpaca (by columns instruction, input, output)" in said.out
    assert "user: Say {name}" in said.out, "braces of a user's rows stay"
    said = call("inspect", str(rows), f"model.path={tiny_model}", "data.sources.0.map=alpacca")
    assert said.code == 2
    assert "alpaca" in said.err


@given(lengths=st.lists(st.integers(0, 100_000), max_size=60))
def test_every_used_row_stands_in_one_bar(lengths: list[int]) -> None:
    bars = bars_of(np.array(lengths, dtype=np.int32))
    used = [length for length in lengths if length > 0]
    assert len(bars) <= BARS
    assert [bar.rows for bar in bars] == [
        sum(bar.first <= length <= bar.last for length in used) for bar in bars
    ]
    assert sum(bar.rows for bar in bars) == len(used)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_a_pack_is_drawn_as_wide_as_all_others(sizes: list[int]) -> None:
    line = terminal.pack_line(sizes, max(sum(sizes), 100)).plain
    drawn = line[2:].partition("  ")[0]
    assert len(drawn) == terminal.WIDTH
    assert f"{sum(sizes):,} tokens" in line


def test_stretches_join_to_the_whole() -> None:
    ids = np.arange(7, dtype=np.int32)
    labels = np.where(np.array([0, 0, 1, 1, 0, 1, 0], dtype=bool), ids, IGNORE_INDEX)
    parts = list(stretches(ids, labels))
    assert parts == [([0, 1], False), ([2, 3], True), ([4], False), ([5], True), ([6], False)]
    assert list(stretches(ids[:0], labels[:0])) == []


def test_unknown_source_is_not_taken_for_one_that_is_to_come(tmp_path: Path) -> None:
    def source(path: str) -> bool:
        config = load_recipe("internlm_7b_qlora_oasst1_e3", [f"data.sources.0.path={path}"])
        return survey.is_elsewhere(config.data.sources[0])

    assert source("./openassistant-guanaco")
    assert source("org/data-set")
    assert not source("rows.jsonl")
    assert not source("data/rows.jsonl")
    assert not source("./nothing")
    assert not source(str(tmp_path))


def test_planning_starts_no_ray(recipe: Recipe) -> None:
    planning.plan_recipe(recipe)
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
