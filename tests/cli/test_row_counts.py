"""Rows counted before a run: all of a few, a sample of many, and never the one for the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft import inspection, planning, row_counts
from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError
from raytune_ft.inspection import page, terminal
from tests.cli.conftest import Command
from tests.conftest import write_chats

ROWS, STRETCHES, STRETCH_ROWS = 3_000, 16, 40
READ = STRETCHES * STRETCH_ROWS


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three thousand chats; every twentieth row has no answer."""
    path = write_chats(tmp_path_factory.mktemp("many") / "rows.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[::20] = ['{"messages": []}'] * len(lines[::20])
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_of(file: Path, model: Path, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"sources": [{"path": str(file)}], "max_length": 128, **data},
            "train": {"epochs": 2, "accumulation": 8},
        }
    )


def counted(recipe: Recipe) -> row_counts.Counted:
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    encoder = Encoder.of(recipe, TextTokenizer.from_folder(recipe.model.path))
    return row_counts.count_tokens(rows, encoder, recipe).counted


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take three thousand rows for too many to read."""
    limit(monkeypatch)


def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EXACT_ROWS", ROWS - 1), ("STRETCHES", STRETCHES)):
        monkeypatch.setattr(row_counts, name, value)
    monkeypatch.setattr(row_counts, "STRETCH_ROWS", STRETCH_ROWS)


def test_up_to_the_bound_every_row_is_read(file: Path, tiny_model: Path) -> None:
    found = counted(recipe_of(file, tiny_model))
    assert (found.read, found.exact) == (ROWS, True)
    assert found.report["rows"] == ROWS
    assert found.report["dropped"] == {"empty": ROWS // 20}


@pytest.mark.parametrize(
    "data",
    [{}, {"pack": "concat"}, {"pack": "none"}, {"over_length": "split", "max_length": 32},
     {"compat": "xtuner-0.1.9"}],
    ids=str,
)  # fmt: skip
def test_a_sample_comes_near_what_all_rows_give(
    file: Path, tiny_model: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 3 %, of a fifth of the rows; the sample's stretches hold whole cycles of lengths."""
    recipe = recipe_of(file, tiny_model, **data)
    whole = counted(recipe)
    limit(monkeypatch)
    part = counted(recipe)
    assert not part.exact
    assert part.read == READ
    assert part.packs is not None and part.density is not None and part.steps is not None
    assert part.packs == pytest.approx(whole.packs, rel=0.03)
    assert part.steps == pytest.approx(whole.steps, rel=0.03)
    assert part.density == pytest.approx(whole.density, rel=0.03)
    assert part.report["rows"] == ROWS
    for key in ("used", "tokens", "targets"):
        assert part.report[key] == pytest.approx(whole.report[key], rel=0.03), key  # type: ignore[literal-required]
    assert part.report["dropped"]["empty"] == pytest.approx(ROWS / 20, rel=0.03)


def test_a_sample_is_spread_over_all_rows_and_its_seed_decides(
    file: Path, tiny_model: Path, sampled: None
) -> None:
    data = recipe_of(file, tiny_model).data
    rows = sources.open_sources(data, 1)

    def lines(seed: int) -> list[int]:
        chosen = row_counts.sample(rows, seed)
        return [int(chosen.where(i).rpartition(":")[2]) for i in range(len(chosen))]

    assert lines(1) == lines(1) != lines(2)
    assert lines(1) == sorted(set(lines(1)))
    parts = np.histogram(lines(1), bins=8, range=(1, ROWS))[0]
    assert parts.min() > len(lines(1)) / 8 / 2
    assert {place % 20 for place in lines(1)} == set(range(20))


def test_what_is_estimated_is_marked(
    file: Path, tiny_model: Path, sampled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(file, tiny_model)
    planning.print_plan(recipe)
    text = capsys.readouterr().out
    assert f"{READ:,} of 3,000 rows were read; figures with ~ are estimates" in text
    assert "used of 3,000, ~" in text
    assert "packs" in text and "by best fit, rows apart" in text
    for line in text.splitlines():
        if line.startswith(("rows", "tokens", "packs", "steps", "  empty")):
            assert "  ~" in line, line
    planning.print_plan(recipe, as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows_read"], plan["exact"], plan["rows"]["rows"]) == (READ, False, ROWS)

    view = inspection.look(recipe, "rows", 1)
    terminal.show(view)
    text = capsys.readouterr().out
    assert f"Tokens per row, {READ:,} of 3,000 rows" in text
    assert sum(bar.rows for bar in view.bars) < READ
    assert "figures with ~ are estimates" in text
    html = page.write_page(view, str(tmp_path / "rows.html")).read_text(encoding="utf-8")
    assert "figures with ~ are estimates" in html


def test_what_is_counted_is_not_marked(
    file: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = recipe_of(file, tiny_model)
    source = small.data.sources[0].model_copy(update={"limit": 300})
    small = small.model_copy(update={"data": small.data.model_copy(update={"sources": [source]})})
    planning.print_plan(small)
    text = capsys.readouterr().out
    assert "estimates" not in text
    (packs,) = [line for line in text.splitlines() if line.startswith("packs")]
    assert "~" not in packs
    (steps,) = [line for line in text.splitlines() if line.startswith("steps")]
    assert "~" in steps, "another epoch packs other rows together"


def test_cut_and_split_rows_are_counted_and_named(
    tiny_model: Path, chats: Path, call: Command
) -> None:
    words = [f"model.path={tiny_model}", "data.max_length=42"]
    said = call("inspect", str(chats), *words)
    assert said.code == 0, said.err
    assert "cut at max_length" in said.out and f"{chats}:" in said.out
    said = call("inspect", str(chats), *words, "data.over_length=split", "data.pack=none")
    assert said.code == 0, said.err
    assert "split at max_length" in said.out
    assert "a row each" in said.out


def test_without_a_tokenizer_a_sample_of_conversations_is_read(
    file: Path, tiny_model: Path, sampled: None
) -> None:
    recipe = recipe_of(file, tiny_model)
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    found = row_counts.count_rows(rows, recipe)
    assert (found.exact, found.packs, found.report["rows"]) == (False, None, ROWS)
    assert found.report["dropped"]["empty"] == pytest.approx(ROWS / 20, rel=0.03)


def test_rows_of_which_none_is_left_end_it(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    path.write_text(good + "\n")
    with pytest.raises(DataError, match="none of 1 rows can be trained on: 1 over max_length"):
        counted(recipe_of(path, tiny_model, max_length=8, over_length="drop"))
