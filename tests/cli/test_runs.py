"""`raytune-ft runs` and `report`: what a folder of runs says of itself, damaged ones included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from raytune_ft.cli import tables
from raytune_ft.cli.watching import HEAD
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder, append_jsonl
from raytune_ft.training.watching.reporting import write_report
from raytune_ft.training.watching.reporting.listing import SUMMARY, figures_of, list_runs
from tests.cli.conftest import Command
from tests.training.made_runs import make_run


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Six runs, each with another status; two more folders are no runs."""
    folder = tmp_path / "runs"
    for place, status in enumerate(("done", "failed", "stopped", "running")):
        run = make_run(folder / status, steps=30, total=60, every=10, seed=place, status=status)
        run.update(created=f"2026-01-0{place + 1}T00:00:00+00:00")
        (run.checkpoints / "step_000030").mkdir(parents=True)
    gone = make_run(folder / "interrupted", steps=5, total=60, status="running")
    gone.update(
        created="2026-01-05T00:00:00+00:00", driver={**liveness.this_process(), "pid": dead_pid()}
    )
    shutil.copytree(folder / "done", folder / "damaged")
    (folder / "damaged" / "run.json").write_text('{"name": "dam')
    (folder / "notes").mkdir()
    (folder / "mlflow.db").write_text("no run")
    return folder


def test_each_run_has_its_honest_status_newest_first(storage: Path) -> None:
    found = {entry.name: entry for entry in list_runs(storage)}
    assert list(found) == ["interrupted", "running", "stopped", "failed", "done", "damaged"]
    assert {name: entry.status for name, entry in found.items()} == {name: name for name in found}
    assert [name for name, entry in found.items() if entry.resumable] == ["stopped", "failed"]
    assert found["damaged"].remark == "run.json is not readable"
    assert found["damaged"].steps == 30, "its steps are there all the same"


def test_figures_are_those_of_the_last_step(storage: Path) -> None:
    run = RunFolder(storage / "done")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    entry = next(one for one in list_runs(storage) if one.name == "done")
    assert (entry.steps, entry.total, entry.loss) == (30, 60, lines[-1]["loss"])
    assert entry.val_loss == lines[29]["val_loss"]
    assert (entry.best, entry.best_step) == (
        min(lines[9::10], key=lambda e: e["val_loss"])["val_loss"],
        30,
    )
    assert entry.seconds == pytest.approx(sum(line["seconds"] for line in lines))
    speeds = sorted(line["tokens_per_s"] for line in lines)
    assert entry.tokens_per_s == pytest.approx((speeds[14] + speeds[15]) / 2)


def test_what_is_piped_is_one_line_a_run_with_tabs(storage: Path, call: Command) -> None:
    said = call("runs", str(storage))
    head, *lines = [line.split("\t") for line in said.out.splitlines()]
    assert said.code == 0 and head[:2] == ["name", "status"] and len(lines) == 6
    assert {len(line) for line in lines} == {len(head)}
    assert lines[2][:2] == ["stopped", "stopped (resumable)"]
    assert lines[-1][-1] == "run.json is not readable"


def test_only_some_runs_in_another_order(storage: Path, call: Command) -> None:
    def names(*words: str) -> list[str]:
        said = call("runs", str(storage), *words)
        assert said.code == 0
        return [line.partition("\t")[0] for line in said.out.splitlines()[1:]]

    assert names("--status", "running") == ["running"]
    assert names("--status", "done", "--status", "failed", "--sort", "name") == ["done", "failed"]
    assert names("--sort", "name") == sorted(names())
    losses = {entry.name: entry.loss for entry in list_runs(storage)}
    assert names("--sort", "loss") == sorted(losses, key=lambda name: losses[name])
    assert names("--sort", "step")[-1] == "interrupted", "the one of fewest steps"
    assert names("--sort", "val_loss")[-1] == "interrupted", "what is not known stands last"
    wrong = call("runs", str(storage), "--status", "runing")
    assert wrong.code == 2 and "did you mean 'running'?" in wrong.err
    assert call("runs", str(storage), "--sort", "age").code == 2
    shutil.rmtree(storage / "running")
    none = call("runs", str(storage), "--status", "running")
    assert none.code == 1 and none.err.endswith("none of its 5 runs is running\n")


def test_an_age_is_that_of_the_last_sign_of_life(storage: Path) -> None:
    for path in (storage / "done").iterdir():
        if path.is_file():
            os.utime(path, (1e9, 1e9))
    later = time.time() - 5000
    os.utime(storage / "done/metrics.jsonl", (later, later))
    (entry,) = list_runs(storage / "done")
    assert entry.seen == pytest.approx(5000, abs=600)


SWEEP = {
    "planned": range(8), "started": range(6), "rung": range(6), "done": range(3), "stopped": [3],
    "failed": [4],
}  # fmt: skip


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_sweep_is_listed_with_its_trials(storage: Path, call: Command, status: str) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        (storage / status / name).unlink(missing_ok=True)
    for event, trials in SWEEP.items():
        for trial in trials:
            line = {"event": event, "trial": trial}
            append_jsonl(storage / status / "trials.jsonl", line)
    append_jsonl(storage / status / "trials.jsonl", {"event": "started", "trial": 3})
    (entry,) = [one for one in list_runs(storage) if one.name == status]
    counts = {"done": 3, "stopped early": 1, status: 1, "waiting": 2, "failed": 1}
    assert entry.trials == counts and sum(counts.values()) == 8
    assert (entry.remark, entry.resumable) == ("", status == "interrupted")
    (line,) = [row for row in call("runs", str(storage)).out.splitlines() if row.startswith(status)]
    assert "5/8 trials" in line and "3 done, 1 stopped early" in line and f"1 {status}" in line


def test_a_sweep_without_a_ledger_is_counted_by_its_trials_records(storage: Path) -> None:
    for number, status in enumerate(("done", "stopped early", "failed: out of memory", "running")):
        make_run(storage / f"stopped/trials/trial_{number:04d}", steps=2, status=status)
    (entry,) = [one for one in list_runs(storage) if one.name == "stopped"]
    assert entry.trials == {"done": 1, "stopped early": 1, "interrupted": 1, "failed": 1}


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_terminal_that_is_narrow_shows_what_matters_most(
    storage: Path, call: Command, width: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [line.split("\t")[:-1] for line in call("runs", str(storage)).out.splitlines()[1:]]
    tables.print_runs(HEAD, [tuple(row) for row in rows], [])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, [head, *lines])) <= width
    there = {name for name in HEAD if name in head}
    assert {"name", "status", "step", "loss", "val loss"} <= there
    assert ("seen" in there) == (width >= 80) and ("created" in there) == (width == 200)
    if width >= 80:
        assert len(lines) == 6, "a line a run"
    has_legend = any(line.startswith(tables.LEGEND[:20]) for line in lines)
    assert has_legend == any(" + " in line and line[0] != "+" for line in lines)


def test_what_a_run_calls_itself_does_not_steer_the_terminal(storage: Path, call: Command) -> None:
    RunFolder(storage / "done").update(name="a\x1b[2Jb\u202ec", model_folder="m\x9b31m")
    said = call("runs", str(storage))
    assert not set("\x1b\x9b\u202e") & set(said.out) and "ab\N{REPLACEMENT CHARACTER}c" in said.out


def test_json_has_plain_values(storage: Path, call: Command) -> None:
    said = call("runs", str(storage), "--json")
    found = {entry["name"]: entry for entry in json.loads(said.out)}
    assert found["stopped"]["resumable"] is True and found["stopped"]["steps"] == 30
    assert Path(found["done"]["path"]) == storage / "done"


def test_a_run_of_its_own_and_folders_without_any(storage: Path, call: Command) -> None:
    assert [entry.name for entry in list_runs(storage / "done")] == ["done"]
    empty = call("runs", str(storage / "notes"))
    assert (empty.code, empty.out) == (1, "") and "holds no run" in empty.err
    missing = call("runs", str(storage / "nowhere"))
    assert missing.code == 2 and missing.err.count("\n") == 1 and "no such folder" in missing.err


HARM = {
    "metrics cut short": ("metrics.jsonl", lambda text: text[:-7], "metrics.jsonl is cut short"),
    "metrics empty": ("metrics.jsonl", lambda _: "", "no steps in metrics.jsonl"),
    "status is a number": ("run.json", lambda _: '{"status": 3}', "run.json is of no run"),
    "run.json a list": ("run.json", lambda _: "[]", "run.json is not readable"),
    "driver is a word": (
        "run.json", lambda _: '{"name": "x", "status": "running", "driver": "me"}',
        "run.json is of no run",
    ),
    "summary.json of others": (
        SUMMARY, lambda text: text.replace('"steps": 30', '"steps": "<b>"'), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_run_is_listed_with_a_remark(storage: Path, call: Command, harm: str) -> None:
    name, change, remark = HARM[harm]
    write_report(RunFolder(storage / "done"))
    path = storage / "done" / name
    path.write_text(change(path.read_text()))
    said = call("runs", str(storage))
    (line,) = [one for one in said.out.splitlines() if one.startswith(("done", "x\t"))]
    assert said.code == 0 and remark in line.split("\t")[-1]


def test_a_report_spares_reading_the_steps_again_until_they_change(storage: Path) -> None:
    run = RunFolder(storage / "done")
    fresh = figures_of(run)
    write_report(run)
    assert figures_of(run) == fresh == json.loads((run.path / SUMMARY).read_text())
    _, *others = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(others))
    assert figures_of(run)["steps"] == 29


def test_a_report_is_written_again_for_a_run_that_goes_on(storage: Path, call: Command) -> None:
    said = call("report", str(storage / "running"))
    assert (said.code, said.out) == (0, f"{storage / 'running' / 'report.html'}\n")
    assert "tag running" in (storage / "running" / "report.html").read_text()
    assert call("report", str(storage / "notes")).code == 2


def test_many_runs_are_listed_at_once(tmp_path: Path) -> None:
    """Only that the second look reads no steps: the first one's summaries are used."""
    for number in range(5):
        write_report(make_run(tmp_path / f"run_{number}", steps=200))
        size = (tmp_path / f"run_{number}" / "metrics.jsonl").stat().st_size
        (tmp_path / f"run_{number}" / "metrics.jsonl").write_text(" " * (size - 1) + "\n")
    assert [entry.steps for entry in list_runs(tmp_path)] == [200] * 5
