"""The leaderboard: what stands on a terminal, in a pipe, and in leaderboard.jsonl."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from raytune_ft.screen import Screen
from raytune_ft.sweeping.board import Board, speed_of, write_leaderboard
from raytune_ft.sweeping.trials import DONE, RUNNING, STOPPED, WAITING, Trial
from raytune_ft.sweeping.words import assignments, short_field, short_value
from raytune_ft.training.run_folder import append_jsonl
from tests.sweeping.made_sweeps import recipe_of

VALUES = {"train.lr": 3.16e-4, "lora.r": 16, "lora.alpha": 32}
TUNE = recipe_of().tune


def trial(number: int, state: str = WAITING, metric: float | None = None, **known: Any) -> Trial:
    about = {"values": VALUES, "step": 0, "folder": Path("absent"), "seconds": 0.0, **known}
    return Trial(number, f"trial_{number:04d}", metric=metric, state=state, **about)


def board(*, terminal: bool = False, width: int = 80, now: list[float] | None = None) -> Board:
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, height=24, highlight=False
    )
    clock = now or [0.0]
    return Board(Screen(4, console=console), TUNE, 20, now=lambda: clock[0])


def printed(shown: Board) -> str:
    file = shown.screen.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_piped_each_change_is_a_line_and_nothing_else_is() -> None:
    shown = board()
    one = trial(0)
    with shown:
        for step, metric in ((0, None), (1, 3.0), (2, 2.5), (5, 2.0), (5, 2.0), (20, 1.5)):
            one = replace(one, state=RUNNING, step=step, metric=metric)
            shown.update([one, trial(1)])
        shown.update([replace(one, state=DONE), trial(1)])
        before = printed(shown)
    lines = [line.partition(" | at most")[0] for line in before.splitlines()]
    assert lines == [
        "trial 0 | lr=3.16e-04 r=16 alpha=32 | running",
        "trial 0 | lr=3.16e-04 r=16 alpha=32 | step 1/~20 | val_loss 3.0000 | running",
        "trial 0 | lr=3.16e-04 r=16 alpha=32 | step 5/~20 | val_loss 2.0000 | running",
        "trial 0 | lr=3.16e-04 r=16 alpha=32 | step 20/~20 | val_loss 1.5000 | running",
        "trial 0 | lr=3.16e-04 r=16 alpha=32 | step 20/~20 | val_loss 1.5000 | done",
    ]


def test_the_table_at_the_end_has_all_trials_best_first_and_why_some_failed() -> None:
    shown = board()
    with shown:
        shown.update([
            trial(0, DONE, 1.5, step=20), trial(1, "failed: loss is nan [b]at step 3", step=3),
            trial(2, STOPPED, 1.2, step=5), trial(3, DONE, 1.25, step=20), trial(4),
        ])  # fmt: skip
        before = printed(shown)
    table = printed(shown)[len(before) :].splitlines()
    assert table[0] == "leaderboard"
    assert table[1] == "2 of 5 trials done, 1 stopped early, 1 failed, 1 waiting"
    rows = [line.split() for line in table[3:8]]
    assert [row[1] for row in rows] == ["3", "0", "2", "4", "1"]
    assert rows[0] == ["1", "3", "3.16e-04", "16", "32", "1.2500", "20", "done"]
    assert "trial 1 failed: loss is nan [b]at step 3" in table, "not taken for markup"


@pytest.mark.parametrize("fields", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("terminal", [True, False])
def test_it_fits_a_terminal_of_80_columns(terminal: bool, fields: int) -> None:
    values = {f"train.a_long_name_{i}": [1.2345e-4, "cosine", 16][i % 3] for i in range(fields)}
    shown = board(terminal=terminal)
    shown.update([
        trial(i, (DONE, RUNNING, STOPPED, "failed: " + "word " * 60)[i % 4], 1234.5678 + i,
              step=100_000 + i, values=values)
        for i in range(8)
    ])  # fmt: skip
    before = len(printed(shown))
    shown.screen.console.print(shown.table())
    plain = Text.from_ansi(printed(shown)[before:]).plain.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in plain)
    rows = [line.split() for line in plain[2:] if line.split()[0].isdigit()]
    assert sorted(row[1] for row in rows) == [str(i) for i in range(8)]
    assert {row[-1] for row in rows} == {"done", "running", "early", "failed"}
    assert all(words in " ".join(plain) for words in ("1.23e-04", "1,234.6", "100001/~20"))


def test_a_hundred_trials_leave_room_on_the_terminal() -> None:
    shown = board(terminal=True)
    with shown:
        shown.update([trial(i, DONE, float(i), step=20) for i in range(60)]
                     + [trial(i) for i in range(60, 100)])  # fmt: skip
        live = Console(file=io.StringIO(), width=80)
        live.print(shown.table(rows=shown.screen.console.height - 8))
        assert isinstance(live.file, io.StringIO)
        lines = live.file.getvalue().splitlines()
        assert len(lines) <= 24 and "... 44 more" in lines[-1]
        assert lines[0].startswith("60 of 100 trials done, 40 waiting")


def test_the_end_is_told_by_the_steps_taken_while_it_was_watched() -> None:
    """A sweep that is taken up again does not count the steps of the driver before."""
    now = [100.0]
    shown = board(now=now)
    shown.update([trial(0, DONE, 1.0, step=20), trial(1, RUNNING, step=4), trial(2)])
    assert "to go" not in shown.headline()
    now[0] += 60.0
    shown.update([trial(0, DONE, 1.0, step=20), trial(1, RUNNING, step=10), trial(2)])
    assert shown.headline().endswith("| at most 5 min to go"), "30 steps at 10 s"


def test_speed_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    assert speed_of(tmp_path) is None
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "tokens_per_s": 10.0, "rows": list(range(40_000))})
    append_jsonl(path, {"step": 2, "tokens_per_s": 1234.5})
    assert speed_of(tmp_path) == 1234.5
    shown = board()
    shown.trials = [trial(0, RUNNING, 1.0, step=2, folder=tmp_path)]
    shown.screen.console.print(shown.table())
    assert "1,234" in printed(shown)
    path.write_text('{"step": 3, "tok')
    assert speed_of(tmp_path) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_and_the_table_are_kept_for_who_reads_along(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    screen = Screen(4, console=console, kept=tmp_path / "lines.log")
    with Board(screen, TUNE, 20) as shown:
        shown.update([trial(0, RUNNING, values={"data.system": "[b]be[/b] kind"})])
        shown.update([trial(0, DONE, 1.0, step=20, values={"data.system": "[b]be[/b] kind"})])
    lines = (tmp_path / "lines.log").read_text().splitlines()
    assert "trial 0 | system=[b]be[/b] kind | running" in lines
    at = lines.index("leaderboard")
    assert lines[at + 1].startswith("1 of 1 trials done") and "[b]be[/b] kind" in lines[at + 3]
    assert terminal or "trial 0 | system=[b]be[/b] kind | running\n" in printed(shown)


def test_leaderboard_jsonl_has_a_line_for_each_trial_best_first(tmp_path: Path) -> None:
    trials = [
        trial(0, DONE, 1.5, step=20), trial(1, "failed: no"), trial(2, STOPPED, 0.5),
        trial(3, DONE, 1.25, step=20),
    ]  # fmt: skip
    write_leaderboard(tmp_path, TUNE, trials[:1])
    write_leaderboard(tmp_path, TUNE, trials)
    lines = [json.loads(line) for line in (tmp_path / "leaderboard.jsonl").open()]
    assert [line["trial"] for line in lines] == [3, 0, 2, 1]
    assert lines[0] | {"folder": ""} == {
        "trial": 3, **VALUES, "val_loss": 1.25, "steps": 20, "state": "done", "seconds": 0.0,
        "folder": "",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["leaderboard.jsonl"]


def test_words() -> None:
    assert [short_value(v) for v in (2.051e-4, 0.1, 0.0, 16, True, "a\nb", ["q", 1])] == [
        "2.05e-04", "0.1", "0", "16", "True", "a b", "q, 1",
    ]  # fmt: skip
    assert len(short_value("x" * 99)) == 24
    assert short_field("lora.r", ["lora.r", "train.lr"]) == "r"
    assert assignments({"a.x": 1, "b.x": 2}) == "a.x=1 b.x=2"
