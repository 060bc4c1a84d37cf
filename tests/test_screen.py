"""The screen: one line a step with what matters, and the panel that ends a run."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raytune_ft.screen import Screen, step_line
from raytune_ft.training.run_folder import append_jsonl
from raytune_ft.training.watching.reporting import summarize
from tests.training.made_runs import make_run
from tests.training.made_runs import step_line as event_of


def event(step: int = 120, total: int = 1560, **changes: Any) -> dict[str, Any]:
    return {**event_of(step, total, np.random.default_rng(0)), "kind": "step", **changes}


def test_a_step_is_one_line_in_one_order() -> None:
    line = step_line(event(loss=1.2841, grad_norm=0.83, lr=1.97e-4, seconds=1.84, eta_seconds=2650,
                           tokens_per_s=17_790.0, mfu=0.381, memory_gib=21.4))  # fmt: skip
    assert line == (
        "step 120/1560 | loss 1.2841 | grad 0.83 | lr 1.97e-04 | 1.84 s | 17,790 tok/s | "
        "mfu 38.1% | mem 21.4 GiB | eta 44 min"
    )


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({"exact": False}, r"^step 120/~1560 \|"),
        ({"mfu": None}, r"tok/s \| mem"),
        ({"data_wait": 0.21}, r"mfu [\d.]+% \| data 21% \| mem"),
        ({"mfu": None, "data_wait": 0.21}, r"tok/s \| data 21% \| mem"),
        ({"val_loss": 1.5}, r"loss [\d.]+ \| held-out 1\.5000 \| grad"),
        ({"eta_seconds": 0.4}, r"eta 0 s$"),
        ({"eta_seconds": 3 * 3600 + 300}, r"eta 3 h 05 min$"),
        ({"eta_seconds": 50 * 3600}, r"eta 2 d 2 h$"),
    ],
)
def test_a_line_says_what_is_odd_and_leaves_out_what_is_unknown(
    changes: dict[str, Any], there: str
) -> None:
    assert re.search(there, step_line(event(**changes)))


def test_lines_come_at_the_interval_at_the_start_and_at_the_end() -> None:
    console = Console(record=True, width=200)
    screen = Screen(10, console=console)
    for step in range(1, 26):
        screen(event(step, 25))
    printed = re.findall(r"step (\d+)/25", console.export_text())
    assert printed == ["1", "10", "20", "25"]


def test_a_closed_screen_shows_nothing_more() -> None:
    console = Console(record=True, width=200)
    screen = Screen(1, console=console)
    screen.close()
    screen(event(1, 25))
    screen.stage("report")
    assert not console.export_text()


def test_a_restart_says_why_and_what_is_done_again() -> None:
    console = Console(record=True, width=200)
    screen = Screen(10, console=console)
    screen({"kind": "restart", "why": "[rank 1] died"})
    screen({"kind": "resumed", "step": 40, "redone": 3})
    screen({"kind": "resumed", "step": 40, "redone": 0})
    screen({"kind": "warning", "text": "wandb: [red]x; goes on"})
    assert console.export_text().splitlines() == [
        "a worker was lost ([rank 1] died); going on from the last checkpoint",
        "resumed from the checkpoint of step 40; 3 steps are taken again",
        "resumed from the checkpoint of step 40",
        "wandb: [red]x; goes on",
    ]


def test_the_end_has_few_answers_and_the_figures_that_matter(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=60, every=10)
    for step in range(0, 61, 5):
        when = {0: "before", 60: "after"}.get(step, "step")
        fields = {"step": step, "when": when, "prompt": "Who?", "answer": f"[b]{step}"}
        append_jsonl(folder.samples, {**fields, "kind": "greedy"})
    append_jsonl(folder.resumes, {"step": 20, "redone": 4})
    console = Console(record=True, width=100)
    Screen(10, console=console).summary(summarize(folder), "runs/run", ["raytune-ft chat runs/run"])
    text = console.export_text()
    assert "before" in text and "after" in text and "[b]60" in text
    assert len(re.findall(r"step \d+ ", text.splitlines()[2])) == 2
    assert re.search(r"held out +loss \d\.\d{4}; best val_loss [\d.]+ at step 60", text)
    assert re.search(r"speed +[\d,]+ tok/s, mfu 3\d\.\d%, \d+ s of steps", text)
    assert re.search(r"memory +21\.40 GiB at the peak", text)
    assert re.search(r"redone +4 steps after lost workers", text)


def test_bars_count_what_is_done_and_mark_an_estimate() -> None:
    """A terminal's bars; the numbers of the stage `samples` are prompts, not steps."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, legacy_windows=False)
    screen = Screen(100, console=console)
    with screen.live():
        screen.stage("data", 40, 108)
        screen({"kind": "stage", "name": "train", "step": 0, "total": 40, "exact": False})
        screen(event(12, 40, exact=False, eta_seconds=49.0))
        screen({"kind": "stage", "name": "samples", "done": 0, "total": 3, "step": 12})
    *_, last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).split("read and tokenise")
    assert re.search(r"rows +━+ 108/108|rows +\S+ 40/108", last)
    assert re.search(r"train +\S+ 12/~40 +eta 49 s +loss [\d.]+", last)
    assert re.search(r"prompts +\S+ 0/3", last)
