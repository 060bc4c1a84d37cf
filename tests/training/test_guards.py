"""Guards one by one: disk, failures, killed processes, stragglers, SIGTERM, the watchdog."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, DataError, TrainingError
from raytune_ft.training.guarding import disk, failures, guards, memory_end, watchdog
from raytune_ft.training.guarding.failures import Elsewhere, Retry
from raytune_ft.training.guarding.interruption import AskedToEnd
from raytune_ft.training.guarding.pulse import PULSE, Pulse, listen
from raytune_ft.training.guarding.stragglers import STEPS, ForwardClock, Stragglers
from raytune_ft.training.guarding.watchdog import Place, Watchdog
from raytune_ft.training.run_folder import RunFolder, read_jsonl, write_json
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState

MIB = 2**20


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path)
    failures.begin(folder)
    yield folder
    PULSE.step = PULSE.attempt = 0


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "none"}, "data": {"sources": [{"path": "none"}]}, **sections,
    })  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB, where this user may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_checkpoint_s_size_is_known_before_it_is_written(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(300, 700), "b": torch.zeros(90)}
    averages = {f"{n}/{k}": t for n, t in weights.items() for k in ("exp_avg", "exp_avg_sq")}
    folder = checkpoint.save(tmp_path, TrainState(step=1), weights, averages, keep=1)
    written = sum(path.stat().st_size for path in folder.iterdir())
    expected = disk.checkpoint_bytes(sum(t.numel() for t in weights.values()), "adamw")
    assert written <= expected < written + disk.SMALL_FILES + 4096


def test_a_full_disk_is_told_before_a_save_begins_and_the_last_checkpoint_stays(
    small_disk: Path,
) -> None:
    weights = {"a": torch.zeros(20, 1000)}
    shapes = {name: t.shape for name, t in weights.items()}
    root = small_disk / "run/checkpoints"
    disk.check_save(root, shapes, "adamw")
    checkpoint.save(root, TrainState(step=1), weights, {}, keep=1)
    (small_disk / "filler").write_bytes(b"x" * (MIB + MIB // 2))
    with pytest.raises(CheckpointError) as caught:
        disk.check_save(root, shapes, "adamw")
    assert str(caught.value) == (
        f"{small_disk}: 0.4 MiB free, the next checkpoint in {root} need 1.2 MiB; free space "
        "there, or set run.storage to another disk"
    )
    assert [path.name for path in root.iterdir()] == ["step_000001"]
    assert checkpoint.load(root / "step_000001").state.step == 1


def test_a_run_is_refused_only_where_its_disk_is_clearly_too_small(small_disk: Path) -> None:
    """Three checkpoints are there at once where two are kept, but no more than are written."""
    every = recipe_of(checkpoint={"every": 10, "keep": 2}, train={"epochs": 1})
    one = disk.checkpoint_bytes(1000, "adamw")
    assert disk.run_bytes(every, 1000, 25) == disk.run_bytes(every, 1000, 900)
    assert disk.run_bytes(every, 1000, 900) - disk.run_bytes(every, 1000, 20) == one
    once = recipe_of(train={"epochs": 1})
    assert disk.run_bytes(once, 1000, 900) + one == disk.run_bytes(every, 1000, 20)
    with pytest.raises(CheckpointError, match=r"2.0 MiB free, checkpoints and result in .* need 9"):
        disk.check_run(small_disk / "new", once, 1000, 25)
    assert not (small_disk / "new").exists()
    disk.check_run(small_disk.parent / "new", once, 1000, 25)


def test_ray_s_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"2.0 MiB free, Ray's session in .* 64.0 MiB; .*TMP"):
        disk.check_ray(small_disk / "ray")
    monkeypatch.setattr(disk, "RAY_BYTES", 0)
    assert disk.check_ray(small_disk / "ray") is None
    (small_disk / "filler").write_bytes(b"x" * (2 * MIB - 40_000))
    line = disk.check_ray(small_disk / "ray")
    assert line is not None and line.startswith(f"{small_disk}, where Ray keeps ")
    assert "98% full (0.0 MiB free)" in line


def told(run: RunFolder) -> list[tuple[str, bool]]:
    return [(e["words"], e["fatal"]) for e in read_jsonl(run.path / failures.FILE)]


def fail(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work


def test_a_user_s_mistake_ends_a_run_and_any_other_error_is_tried_again(run: RunFolder) -> None:
    failures.guard(fail(DataError("rows.jsonl:3: no")), run, 0)
    assert told(run) == [("rows.jsonl:3: no", True)]
    error = failures.fatal(run)
    assert isinstance(error, DataError) and str(error) == "rows.jsonl:3: no"
    failures.begin(run)
    failures.guard(fail(Elsewhere("rank 1 tells")), run, 0)
    assert told(run) == []
    with pytest.raises(Retry):
        failures.guard(fail(Retry("smaller")), run, 0)
    assert told(run) == []


def test_the_same_error_at_the_same_step_twice_ends_a_run(run: RunFolder) -> None:
    def meets(words: str, step: int, rank: int = 0) -> bool:
        """Return whether another start would follow."""
        PULSE.step = step
        try:
            failures.guard(fail(RuntimeError(f"Traceback\n{words}\n")), run, rank)
        except RuntimeError:
            return True
        return False

    assert meets("device lost", 3)
    assert meets("device lost", 3, rank=1), "ranks that fail together are one failure"
    assert meets("device lost", 4)
    assert meets("no peer", 3)
    assert failures.fatal(run) is None
    assert not meets("device lost", 3)
    words = "step 3: the same failure twice: RuntimeError: device lost"
    assert told(run)[-1] == (words, True)
    assert isinstance(failures.fatal(run), TrainingError)


def test_hangs_at_the_same_step_are_the_same_whoever_tells(run: RunFolder) -> None:
    PULSE.step, PULSE.attempt = 5, 1
    assert not failures.note(run, "rank 0: data", rank=0, kind=failures.HANG)
    assert not failures.note(run, "rank 0: data", rank=2, kind=failures.HANG), "of one start"
    PULSE.attempt = 2
    assert failures.note(run, "rank 0: backward", rank=1, kind=failures.HANG)


def leave_pulse(run: RunFolder, attempt: int, step: int, *, share: float, kills: int) -> None:
    """Leave what a killed process leaves."""
    pulse = {
        "attempt": attempt, "beats": 9, "phase": "passes 1 of 2", "step": step, "pid": 1,
        "host": watchdog.host(), "memory": {"kills": kills, "share": share},
    }  # fmt: skip
    (run.path / watchdog.FOLDER).mkdir(exist_ok=True)
    write_json(run.path / watchdog.FOLDER / ".pulse_0.json", pulse)


def test_processes_killed_for_memory_at_the_same_step_twice_end_a_run(run: RunFolder) -> None:
    kills = memory_end.kills()
    leave_pulse(run, attempt=1, step=7, share=0.97, kills=kills)
    guards._see_who_was_killed(run)
    leave_pulse(run, attempt=2, step=7, share=0.5, kills=kills - 1)
    with pytest.raises(TrainingError, match=r"killed \(out of memory\?\) at step 7 twice; see "):
        guards._see_who_was_killed(run)


def test_a_killed_process_with_memory_left_and_one_that_told_its_end_are_no_such_case(
    run: RunFolder,
) -> None:
    for attempt in (1, 2):
        leave_pulse(run, attempt, step=7, share=0.5, kills=memory_end.kills())
        guards._see_who_was_killed(run)
    assert told(run) == [("killed at step 7", False)] * 2
    PULSE.step, PULSE.attempt = 7, 3
    failures.note(run, "hung", rank=1, kind=failures.HANG)
    leave_pulse(run, attempt=3, step=7, share=0.99, kills=0)
    guards._see_who_was_killed(run)
    assert told(run)[2:] == [("hung", False)]


def test_a_rank_that_stays_slow_is_told_of_once() -> None:
    stragglers = Stragglers()
    usual = [1.0, 1.1, 0.9, 1.0]
    lines: list[str] = []
    for step in range(1, 100):
        slow = usual if step == 10 else [1.0, 1.1, 3.5, 1.0]
        lines += stragglers.update(step, slow)
    (line,) = lines
    assert line.startswith(f"step {10 + STEPS}: rank 2 has been 3.5 times slower than the others")
    two = Stragglers()
    assert [two.update(s, [0.1, 0.4]) != [] for s in range(1, 22)].index(True) == STEPS - 1
    one = Stragglers()
    assert not any(one.update(s, [9.0]) for s in range(99))


def test_forward_passes_are_timed_and_backward_passes_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spend(1.0)
            if x.requires_grad:
                x.register_hook(lambda _: spend(100.0))
            return x * 2

    monkeypatch.setattr("raytune_ft.training.guarding.stragglers.time.perf_counter", lambda: now[0])
    module = Slow()
    clock = ForwardClock(module, torch.device("cpu"))
    for _ in range(2):
        module(torch.ones(1, requires_grad=True)).sum().backward()
    with torch.no_grad():
        module(torch.ones(1))
    assert clock.take() == 2.0
    assert clock.take() == 0.0
    assert now[0] == 203.0


def test_sigterm_is_a_flag_in_any_thread_and_ends_nothing_while_it_is_asked_for() -> None:
    seen: list[bool] = []

    def train() -> None:
        with AskedToEnd() as asked:
            seen.append(asked())
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not asked() and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_layers_and_gradients_beat() -> None:
    network = nn.ModuleDict({
        "layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), "head": nn.Linear(2, 1),
    })  # fmt: skip
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network["layers"][0].weight.requires_grad_(True)
    listen(network, [network["layers"][0].weight])
    hidden = torch.ones(1, 2)
    before = PULSE.beats
    for layer in network["layers"]:
        hidden = layer(hidden)
    assert PULSE.beats == before + 3
    network["head"](hidden).sum().backward()
    assert PULSE.beats == before + 4


def test_a_watchdog_ends_what_does_not_beat_and_nothing_else(tmp_path: Path) -> None:
    ended, lines = threading.Event(), []
    pulse = Pulse(phase="data", step=4)
    place = Place(tmp_path / "stacks", 0, 1, attempt=9)

    def hung(line: str, step: int) -> None:
        lines.append((line, step))

    with Watchdog(place, pulse, 1.0, hung, end=lambda _: ended.set()):
        for _ in range(20):
            pulse.beat()
            assert not ended.wait(0.1)
        assert ended.wait(30)
    assert lines == [(
        f"step 4: no worker went on for 1 s (rank 0: data); their stacks are in {place.folder}", 4,
    )]  # fmt: skip
    stack = (place.folder / "rank_0.txt").read_text()
    assert "test_a_watchdog_ends_what_does_not_beat" in stack
