"""Who took from whom: in the ledger, on the leaderboard, on the page, beside the best recipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytune_ft.config import loader
from raytune_ft.screen import Screen
from raytune_ft.sweeping import lineage
from raytune_ft.sweeping.board import Board, write_leaderboard
from raytune_ft.sweeping.keeping import keep
from raytune_ft.sweeping.page import write_page
from raytune_ft.sweeping.trials import Ledger, Turn
from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl
from tests.sweeping.made import recipe_of
from tests.sweeping.made_sweeps import make_sweep

RECIPE = recipe_of(
    {"train.lr": {"low": 1e-5, "high": 1.0}}, tune={"scheduler": "pbt", "metric": "val_loss"},
    data={"validation": 0.1},
)  # fmt: skip


def of(lr: float) -> dict[str, Any]:
    return {"train.lr": lr}


def written(sweep: Path) -> Ledger:
    """Four trials; 3 took from 2 at step 10, which took from 0 at step 20, and 3 again at 30."""
    ledger = Ledger.read(sweep)
    ledger.planned([of(0.1 * (n + 1)) for n in range(4)])
    ledger.started(3)
    ledger.paused(3, 10, 4.0)
    ledger.exploited({3: Turn(10, 2, of(0.36))})
    ledger.started(2)
    ledger.paused(2, 20, 2.0)
    ledger.paused(3, 20, 1.5)
    ledger.exploited({2: Turn(20, 0, of(0.12))})
    ledger.started(2)
    ledger.exploited({3: Turn(30, 2, of(0.1)), 1: Turn(30, 2, of(0.14))})
    return ledger


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    again = Ledger.read(tmp_path)
    assert again.trials == ledger.trials
    assert (again.rungs, again.exploits) == (ledger.rungs, ledger.exploits)
    assert (ledger.carried, again.carried) == (2, 2)
    assert [n for n, _ in ledger.exploits] == [3, 2, 3, 1]
    assert again.trials[2].turns == (Turn(0, None, of(0.1 * 3)), Turn(20, 0, of(0.12)))
    assert again.trials[2].values == of(0.12)
    assert (again.trials[3].state, again.trials[0].turns) == ("waiting", ())
    again.seen(3, 30, 9.0)
    assert again.trials[3].metric == ledger.trials[3].metric, "of before it had these weights"
    again.seen(3, 31, 9.0)
    assert again.trials[3].metric == 9.0


@pytest.mark.parametrize("cut", range(1, 60))
def test_of_a_half_written_comparison_some_lines_never_happened(tmp_path: Path, cut: int) -> None:
    written(tmp_path)
    content = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(content[:-cut])
    again = Ledger.read(tmp_path)
    assert [n for n, _ in again.exploits[again.carried :]] == [3]


def test_ancestry_is_of_the_weights(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    trials = dict(ledger.trials)
    ledger.exploited({2: Turn(35, 0, of(0.2))})
    assert lineage.ancestry(ledger.trials, 3) == lineage.ancestry(trials, 3), "that was later"
    assert lineage.ancestry(trials, 0) == [{"from_step": 0, "trial": 0, "values": of(0.1)}]
    assert lineage.ancestry(trials, 2) == [
        {"from_step": 0, "trial": 0, "values": of(0.1)},
        {"from_step": 20, "trial": 2, "values": of(0.12)},
    ]
    assert lineage.ancestry(trials, 3) == [
        {"from_step": 0, "trial": 0, "values": of(0.1)},
        {"from_step": 20, "trial": 2, "values": of(0.12)},
        {"from_step": 30, "trial": 3, "values": of(0.1)},
    ]


def test_the_leaderboard_and_its_file_tell_who_took_from_whom(tmp_path: Path) -> None:
    trials = list(written(tmp_path).trials.values())
    output = io.StringIO()
    screen = Screen(10, console=Console(file=output, width=200))
    with Board(screen, RECIPE.tune, 40) as board:
        board.update(trials)
        board.update(trials)
    said = output.getvalue()
    line = "trial 3 went on as trial 2 at step 10 with lr=0.36, trial 2 at step 30 with lr=0.1"
    assert line in said.partition("leaderboard")[2]
    assert said.count("trial 2 went on as trial 0 at step 20 with lr=0.12") == 2  # once, and below
    write_leaderboard(tmp_path, RECIPE.tune, trials)
    turns = {
        line["trial"]: line.get("turns") for line in read_jsonl(tmp_path / "leaderboard.jsonl")
    }
    assert turns[0] is None
    assert turns[2] == [
        {"step": 0, "values": of(0.1 * 3)},
        {"step": 20, "values": of(0.12), "from": 0},
    ]


def test_a_trial_that_pauses_stays_on_the_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    board = Board(Screen(10, console=console), RECIPE.tune, 40)
    board.update(list(written(tmp_path).trials.values()))
    console.print(board.table(rows=10))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [line.split() for line in shown if line[:1].isdigit() and " trials " not in line]
    states = {row[1]: row[-1] for row in rows}
    assert states == {"2": "running", "3": "waiting"}, "0 and 1 have not begun"


def test_the_page_has_a_row_for_each_and_no_share_of_values(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", 12)
    assert "Lineage" not in write_page(folder).read_text()
    ledger = Ledger.read(folder.path)
    values = {**ledger.trials[3].values, "train.lr": 0.0123}
    ledger.exploited({3: Turn(20, 1, values)})
    page = write_page(folder).read_text()
    assert "<td>20</td><td>3</td><td>trial 1</td><td>lr=0.0123" in page
    assert "no share is one value" in page and "Kruskal" not in page


@pytest.mark.parametrize("number", [0, 3])
def test_beside_the_best_recipe_stands_how_its_values_changed(tmp_path: Path, number: int) -> None:
    folder = RunFolder(tmp_path)
    folder.create("sweep", loader.dump_yaml(RECIPE))
    ledger = written(folder.path)
    for trial in list(ledger.trials.values()):
        (trial.folder / "adapter").mkdir(parents=True)
        (trial.folder / "adapter/weights").write_text(trial.name)
        worth = 1.0 if trial.number == number else 2.0
        ledger.ended("done", trial.number, metric=worth, step=40)
    best = keep(RECIPE, list(ledger.trials.values()), folder)
    assert best.number == number
    text = (folder.path / "best.yaml").read_text()
    assert loader.load_recipe(str(folder.path / "best.yaml")).train.lr == pytest.approx(0.1)
    changed = number == 3
    assert text.startswith("# These are trial 3's last values, from step 30 on") == changed
    assert (folder.path / lineage.FILE).is_file() == changed
    if changed:
        expected = {"trial": 3, "weights": lineage.ancestry(ledger.trials, 3)}
        assert read_json(folder.path / lineage.FILE) == expected
        assert lineage.FILE in text
        assert lineage.FILE in (folder.path / "sweep.html").read_text()
    assert json.loads((folder.path / "run.json").read_text())["best"] == number
