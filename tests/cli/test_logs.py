"""`raytune-ft logs`: what a run says, read along while it is written, cut and taken up again."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raytune_ft.lookout import logs, tail
from raytune_ft.lookout.seen import FilesHere, look_at
from raytune_ft.lookout.tail import Tail, clean
from raytune_ft.screen import Screen
from raytune_ft.training.guarding import attending
from raytune_ft.training.run_folder import RunFolder
from tests.cli.conftest import Command
from tests.training.made_runs import make_run

HOSTILE = "a\x1b[2J\x1b]0;owned\x07b \x9b31m red \u202egnp.exe\x1b[31mc\tok\r"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "HERE_S", 0.02)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Lines that are told, as soon as they are."""
    found: list[str | None] = []
    for name in ("_say", "_tell"):
        former = getattr(logs, name)
        monkeypatch.setattr(logs, name, lambda line, say=former: (say(line), found.append(line)))
    return found


class Following:
    """`raytune-ft logs -f` in a thread of this process."""

    def __init__(self, call: Command, *words: str) -> None:
        self.said = None
        self.thread = threading.Thread(target=self._run, args=(call, words), daemon=True)
        self.thread.start()

    def _run(self, call: Command, words: tuple[str, ...]) -> None:
        self.said = call("logs", "-f", *words)

    def end(self) -> tuple[int, list[str], str]:
        self.thread.join(timeout=60)
        assert self.said is not None, "it still follows"
        return self.said.code, self.said.out.splitlines(), self.said.err


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tail_of(path: Path, last: int | None = None) -> Tail:
    return Tail(FilesHere(RunFolder(path.parent)), path.name, last)


LINES = st.lists(st.text(alphabet="ab \r\x0b", max_size=6), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    before=LINES, cut=st.integers(0, 12), after=LINES, block=st.integers(1, 40),
    looked=st.booleans(),
)  # fmt: skip
def test_what_was_shown_and_still_stands_is_not_shown_again(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], cut: int, after: list[str],
    block: int, looked: bool,
) -> None:  # fmt: skip
    """Numbered lines, cut as a resume cuts them: each is shown once, in the order of the file."""
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    first = [f"{number} first {text}".rstrip("\r") for number, text in enumerate(before)]
    then = [f"{number} then {text}".rstrip("\r") for number, text in enumerate(after, start=cut)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK_BYTES", block + 30)
        path.write_bytes("".join(f"{line}\n" for line in first).encode())
        reader = tail_of(path)
        shown = list(reader.new()) if looked else []
        assert shown == (first if looked else [])
        kept = first[:cut]
        other = path.with_name("other")
        other.write_bytes("".join(f"{line}\n" for line in [*kept, *then]).encode())
        other.replace(path)
        rest = list(reader.new())
    assert [*(kept if looked else []), *rest] == [*kept, *then]
    assert (reader.n_cuts > 0) == (looked and len(kept) < len(first))


@given(count=st.integers(0, 20), last=st.integers(0, 25), half=st.booleans())
def test_the_last_lines_are_counted_from_the_end(
    tmp_path_factory: pytest.TempPathFactory, count: int, last: int, half: bool
) -> None:
    path = tmp_path_factory.mktemp("tail") / "lines.log"
    lines = [f"line {number}" for number in range(count)]
    path.write_text("".join(f"{line}\n" for line in lines) + ("half" if half else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK_BYTES", 16)
        reader = tail_of(path, last)
        assert list(reader.new()) == (lines[-last:] if last else [])
        assert reader.rest() == ("half" if half else "")


def test_a_line_is_shown_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.log"
    reader = tail_of(path)
    assert list(reader.new()) == []
    with path.open("a", buffering=1) as file:
        file.write("one\ntw")
        file.flush()
        assert (list(reader.new()), reader.rest()) == (["one"], "tw")
        file.write("o\n")
    assert list(reader.new()) == ["two"]


def test_nothing_of_a_line_steers_the_terminal() -> None:
    shown = clean(HOSTILE + "the last state\x1b[0m")
    assert shown == "the last state"
    assert clean(HOSTILE).isprintable() or clean(HOSTILE) == ""
    shown = clean(HOSTILE.rstrip("\r"))
    assert shown.isprintable() and "\x1b" not in shown and "\u202e" not in shown
    assert shown.startswith("a") and shown.endswith("ok")


def test_what_the_screen_shows_is_kept_without_colours_and_the_bars(tmp_path: Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    screen = Screen(1, console=terminal, kept=tmp_path / "lines.log")
    with screen.live():
        screen.stage("ray")
        screen({"kind": "rows", "text": "dropped [2] rows"})
        screen({"kind": "restart", "why": "killed"})
    head, *lines = (tmp_path / "lines.log").read_text().splitlines()
    assert head.startswith("--- 20")
    assert lines[0].endswith("s] start Ray")
    assert lines[1:] == [
        "dropped [2] rows", "a worker was lost (killed); going on from the last checkpoint",
    ]  # fmt: skip


def test_lines_of_a_run_and_its_other_files(tmp_path: Path, call: Command) -> None:
    run = make_run(tmp_path / "runs/a", steps=12)
    told = call("logs", str(run.path))
    assert told.code == 0 and len(told.out.splitlines()) == 12
    assert told.out.startswith("step 1/12 | loss "), "without lines.log its steps are told"
    run.lines.write_text(f"one\n{HOSTILE.rstrip()}\nthree\n")
    run.log.write_text("noise\n")
    assert call("logs", str(run.path), "-n", "1").out == "three\n"
    assert "\x1b" not in call("logs", str(run.path)).out
    assert call("logs", str(run.path), "--log").out == "noise\n"
    metrics = call("logs", str(run.path), "--metrics", "-n", "2").out.splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [11, 12]


def test_a_run_is_found_by_its_name_and_a_trial_by_its_sweep(
    tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/sweep/trials/trial_0003", steps=3)
    make_run(tmp_path / "runs/a", steps=2)
    for word, steps in {
        "a": 2,
        "runs/a": 2,
        "sweep/trial_0003": 3,
        "runs/sweep/trial_0003": 3,
    }.items():
        assert len(call("logs", word).out.splitlines()) == steps
    missing = call("logs", "b")
    assert missing.code == 2 and missing.err.count("\n") == 1
    assert call("logs", "a", "--log", "--metrics").code == 2


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that goes on, driven by this process."""
    folder = make_run(tmp_path / "runs/a", steps=4, total=8, status="running")
    with attending.attended(folder):
        wait_until(lambda: folder.alive() is not None)
        yield folder


def test_a_run_is_followed_to_its_end(tmp_path: Path, call: Command) -> None:
    """The summary comes behind status `done`: the driver's end counts."""
    folder = make_run(tmp_path / "runs/a", steps=4, total=8, status="running")
    with attending.attended(folder):
        wait_until(lambda: folder.alive() is not None)
        folder.lines.write_text("step 4\n")
        following = Following(call, str(folder.path))
        with folder.lines.open("a", buffering=1) as file:
            file.write("step 5\n")
            folder.update(status="done")
            time.sleep(5 * logs.HERE_S)
            file.write("done\n")
    assert following.end() == (0, ["step 4", "step 5", "done"], "")


ENDS = {
    "failed": ({"words": "step 9: nan", "code": 5}, 5, "failed: step 9: nan; go on with"),
    "stopped": ({"words": "after step 4", "code": 75}, 75, "stopped: after step 4; go on with"),
    "interrupted": (None, 75, "interrupted (its driver is gone); go on with: raytune-ft train"),
}  # fmt: skip


@pytest.mark.parametrize("status", ENDS)
def test_an_end_other_than_done_has_a_line_and_a_code(
    tmp_path: Path, call: Command, status: str
) -> None:
    ended, code, words = ENDS[status]
    folder = make_run(tmp_path / "runs/a", steps=4, total=8, status=status, ended=ended)
    said = call("logs", "-f", str(folder.path))
    assert said.code == code and len(said.out.splitlines()) == 4
    assert said.err.startswith(f"{folder.path}: {words}") and said.err.count("\n") == 1


def test_steps_that_are_taken_again_are_told_once_more(
    run: RunFolder, call: Command, printed: list[str | None]
) -> None:
    following = Following(call, str(run.path), "--metrics")
    wait_until(lambda: len(printed) == 4)
    run.cut_after(2)
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step, "again": True}) + "\n" for step in (3, 4, 5))
    run.update(status="done")
    wait_until(lambda: len(printed) == 8)
    attending.Here(run).write(attending.ALIVE, b"{}")
    code, shown, err = following.end()
    steps = [(json.loads(line)["step"], "again" in json.loads(line)) for line in shown]
    assert code == 0
    assert steps == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (3, True),
        (4, True),
        (5, True),
    ]
    assert err == f"{run.path}: was taken up again from an earlier step\n"


def test_a_run_that_is_still_to_come_is_waited_for(
    tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch, printed: list[str | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    following = Following(call, "later")
    wait_until(lambda: printed)
    made = make_run(tmp_path / "made/later", steps=3, status="running")
    metrics = made.metrics.read_bytes()
    made.metrics.unlink()
    with attending.attended(made):
        wait_until(lambda: made.alive() is not None)
        made.path.parent.rename(tmp_path / "runs")
        time.sleep(5 * logs.HERE_S)
        later = RunFolder(tmp_path / "runs/later")
        later.metrics.write_bytes(metrics)
        later.update(status="done")
        (later.path / attending.ALIVE).unlink()
    code, shown, err = following.end()
    assert (code, len(shown)) == (0, 3)
    assert err.startswith("runs/later: not there yet; waiting")


def test_a_run_that_goes_away_before_it_began(
    tmp_path: Path, call: Command, printed: list[str | None]
) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    with attending.attended(folder):
        wait_until(lambda: folder.alive() is not None)
        folder.lines.write_text("start Ray\n")
        following = Following(call, str(folder.path))
        wait_until(lambda: printed)
        folder.lines.unlink()
    code, _, err = following.end()
    assert code == 2 and "ended before it began" in err


def test_ctrl_c_ends_the_following_with_one_line(run: RunFolder) -> None:
    run.lines.write_text("step 4\n")
    command = [sys.executable, "-m", "raytune_ft", "logs", "-f", str(run.path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "step 4\n", "not kept back though it is piped"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == "error: interrupted\n"


def test_a_name_without_a_run_is_where_it_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert look_at("later").shown == "runs/later"
    assert look_at("here/later").shown == "here/later"
