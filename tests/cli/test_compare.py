"""`raytune-ft compare`: what differs between runs, and why losses may not be comparable."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching.reporting.comparison import compare, differing, flat, unambiguous
from tests.cli.conftest import Command
from tests.training.made_runs import make_run, recipe_of
from tests.training.test_report import HOSTILE, TAGS, markup


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs under `runs/`, which differ in learning rate and batch."""
    monkeypatch.chdir(tmp_path)
    slower = recipe_of("b", train={"lr": 5e-5, "accumulation": 8})
    make_run(tmp_path / "runs" / "a", steps=60, every=10)
    make_run(tmp_path / "runs" / "b", steps=40, total=60, every=10, seed=1, recipe=slower)
    return tmp_path / "runs"


def test_what_is_piped_names_figures_and_fields_that_differ(storage: Path, call: Command) -> None:
    said = call("compare", "a", "runs/b")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in said.out.splitlines()}
    assert (said.code, said.err) == (0, "")
    assert rows[""] == ["a", "b"]
    assert rows["train.lr"] == ["0.0002", "5e-05"] and rows["train.accumulation"] == ["16", "8"]
    assert rows["optimizer steps"] == ["60", "40"]
    assert set(rows) & {"run.name", "train.seed", "model.path"} == set()
    best = compare([RunFolder(storage / "a")] * 2).figures["best, at step"][0]
    assert rows["best, at step"][0] == best and best.endswith(", 60")


def test_json_has_the_same(storage: Path, call: Command) -> None:
    found = json.loads(call("compare", "a", "b", "--json").out)
    assert found["runs"] == ["a", "b"] and found["recipe"]["train.lr"] == ["0.0002", "5e-05"]
    assert found["notes"] == []


OTHER = {
    "their tokenizers differ": {"model": {"path": "models/other"}},
    "their prompt templates differ": {"model": {"template": "internlm2_chat"}},
    "they learn from other rows": {"data": {"sources": [{"path": "others.jsonl"}]}},
    "their held-out rows differ": {"data": {"validation": 0.1}},
    "their objectives differ": {"train": {"objective": "orpo"}},
}


@pytest.mark.parametrize("note", OTHER)
def test_losses_that_are_not_comparable_are_said_to_be(
    storage: Path, call: Command, note: str
) -> None:
    changes = OTHER[note]
    folder = changes.get("model", {}).get("path", "models/tiny")
    make_run(storage / "c", recipe=recipe_of("c", **changes), model_folder=folder)
    said = call("compare", "a", "c")
    (line,) = said.err.splitlines()
    assert line.startswith(f"note: {note}")


def test_a_model_of_the_same_tokenizer_is_comparable(storage: Path, tiny_model: Path) -> None:
    twin = storage.parent / "twin"
    twin.mkdir()
    (twin / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    for name, folder in (("c", tiny_model), ("d", twin)):
        make_run(storage / name, model_folder=str(folder))
    found = compare([RunFolder(storage / "c"), RunFolder(storage / "d")])
    assert found.notes == []
    (twin / "tokenizer.json").write_text("{}")
    (note,) = compare([RunFolder(storage / "c"), RunFolder(storage / "d")]).notes
    assert "tokenizers differ" in note


def test_a_page_has_each_run_in_every_chart(storage: Path, call: Command) -> None:
    said = call("compare", "a", "b", "--html", "out/compare.html")
    assert said.err == "out/compare.html\n"
    page = Path("out/compare.html").read_text()
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) >= 7
    assert all('class="c0' in chart and 'class="c1' in chart for chart in charts)
    assert markup(page).tags <= TAGS and "<td>5e-05</td>" in page


def test_hostile_names_and_recipes_stay_text(storage: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    for place in (storage / name, storage / "x"):
        make_run(place, recipe=recipe_of("x", data={"system": HOSTILE + place.name}))
    (storage / "x" / "recipe.yaml").write_text(f"? {json.dumps(HOSTILE)}\n: {{a: 1}}\n")
    from raytune_ft.training.watching.reporting.comparison import compare_page

    page = compare_page(compare([RunFolder(storage / name), RunFolder(storage / "x")]))
    assert markup(page).tags <= TAGS and not markup(page).attributes & {"src", "onerror", "href"}


def test_damaged_runs_are_compared_as_far_as_they_go(storage: Path, call: Command) -> None:
    (storage / "b" / "recipe.yaml").write_text("model: [\n")
    (storage / "b" / "run.json").write_text("{")
    said = call("compare", "a", "b")
    assert said.code == 0 and "status\tdone\tdamaged" in said.out and "train.lr" not in said.out
    assert said.err == "note: b: recipe.yaml is missing or damaged; its fields are not compared\n"


def test_a_name_that_is_no_run_and_one_run_alone_are_one_line(storage: Path, call: Command) -> None:
    missing = call("compare", "a", "zzz")
    assert missing.code == 2 and missing.err.startswith("error: zzz: no run folder here")
    alone = call("compare", "a")
    assert alone.code == 2 and alone.err.startswith("error: compare: name two runs")
    blocked = call("compare", "a", "b", "--html", "runs/a/run.json/x.html")
    assert blocked.code == 2 and blocked.err.startswith("error: --html: ")


def test_runs_of_one_name_are_told_apart_by_their_parents() -> None:
    paths = [Path("/x/one/run"), Path("/x/two/run")]
    assert unambiguous(paths) == ["one/run", "two/run"]
    assert unambiguous([paths[0], paths[0]])[0].endswith("(1)")


def test_fields_are_compared_by_value_and_lists_whole() -> None:
    left = flat({"a": {"b": 1, "c": [1, 2]}, "d": {}})
    assert left == {"a.b": 1, "a.c": [1, 2], "d": {}}
    assert differing([left, {**left, "a.c": [1]}, {}]) == {"a.c": ["1, 2", "1", ""]}
    assert differing([left, left]) == {}
