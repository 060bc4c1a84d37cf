"""Pairs in `inspect` and `plan`: both sides as the model sees them, counts and packs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from raytune_ft import inspection, planning
from raytune_ft.config.schema import Recipe
from raytune_ft.inspection import page, terminal
from tests.cli.conftest import Command
from tests.training.test_preference import write_pairs


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    rows = write_pairs(tmp_path / "pairs.jsonl", 20)
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "long", "chosen": "a " * 90, "rejected": "b"}) + "\n")
        file.write(json.dumps({"prompt": "stone " * 200, "chosen": "a", "rejected": "b"}) + "\n")
    return Recipe.model_validate({
        "model": {"path": str(tiny_model)},
        "lora": {"r": 4, "alpha": 8},
        "data": {"sources": [{"path": str(rows)}], "max_length": 160},
        "train": {"objective": "dpo", "epochs": 2, "accumulation": 3},
    })  # fmt: skip


def test_inspect_shows_both_sides_of_a_pair_and_what_of_them_is_trained(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    view = inspection.look(recipe, "pairs", 1)
    assert [row.where.rpartition(", ")[2] for row in view.rows] == ["chosen", "rejected"]
    for row in view.rows:
        (question, said), (role, answer) = row.turns
        assert (question, role) == ("user", "assistant") and said.startswith("question 0")
        trained = "".join(piece.text for piece in row.pieces if piece.trained)
        assert trained == f"{answer}<|im_end|>"
        assert row.uncut_length == row.n_tokens > row.n_targets
    assert view.rows[0].turns[0] == view.rows[1].turns[0]
    assert all(len(pack) % 2 == 0 for pack in view.packs) and len(view.packs) > 1
    terminal.show(view)
    out = capsys.readouterr().out
    assert "pairs.jsonl:1, chosen" in out and "pairs.jsonl:1, rejected" in out
    assert re.search(r"without a trained token +1: .*pairs\.jsonl:22\n", out)
    assert re.search(r"cut at max_length +1: .*pairs\.jsonl:21\n", out)
    written = page.write_page(view, str(tmp_path / "page.html"))
    assert "pairs.jsonl:1, rejected" in written.read_text()


def test_a_cut_side_says_what_it_was_cut_from(recipe: Recipe, tmp_path: Path) -> None:
    row = {"prompt": "long", "chosen": "a " * 90, "rejected": "b"}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    source = recipe.data.sources[0].model_copy(update={"path": str(path)})
    data = recipe.data.model_copy(update={"sources": [source]})
    chosen, rejected = inspection.look(recipe.model_copy(update={"data": data}), "x", 1).rows
    assert chosen.uncut_length > chosen.n_tokens == 160 - rejected.n_tokens
    assert rejected.uncut_length == rejected.n_tokens


def test_plan_counts_pairs_packs_and_steps(recipe: Recipe) -> None:
    plan = planning.plan_recipe(recipe)
    assert plan.rows is not None and plan.packs is not None and plan.steps is not None
    assert (plan.rows["rows"], plan.rows["used"], plan.rows["cut"]) == (22, 21, 1)
    assert plan.rows["dropped"] == {"without a trained token": 1}
    assert plan.packs == 11
    assert plan.steps == 2 * -(-plan.packs // 3)


def test_a_bare_file_of_pairs_says_which_objective_reads_it(call: Command, recipe: Recipe) -> None:
    path = recipe.data.sources[0].path
    own = f"model.path={recipe.model.path}"
    said = call("inspect", path, own)
    assert said.code == 3
    assert "preferences are learned with train.objective dpo or orpo" in said.err
    said = call("inspect", path, own, "train.objective=dpo")
    assert said.code == 0, said.err
    assert "pairs.jsonl:1, rejected" in said.out
