"""A save stopped at every file-system call: no bad checkpoint is ever taken for a good one."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.training.saving import checkpoint, durable
from raytune_ft.training.saving.checkpoint import TrainState
from tests.faults import shim
from tests.training.test_checkpoint import whole_steps

BEST, OLD, NEW = 3, 7, 10
KEPT_BEFORE = [BEST, 5, OLD]
WAYS = [*shim.RAISING, *shim.EXITING]


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((40, 20), float(step)), "b": torch.arange(6).to(torch.bfloat16) * step}


def save(root: Path, step: int, keep: int = 2) -> Path:
    state = TrainState(step=step, best_step=BEST, losses=[1.0 / step] * step)
    optimizer = {"a/exp_avg": tensors(step)["a"] / 2, "group0/step": torch.tensor(float(step))}
    return checkpoint.save(root, state, tensors(step), optimizer, keep=keep)


def check(root: Path, step: int) -> None:
    """A checkpoint has what was saved as this step."""
    loaded = checkpoint.load(root / checkpoint.folder_name(step))
    assert loaded.state.step == step
    assert loaded.state.losses == [1.0 / step] * step
    assert all(torch.equal(loaded.weights[k], v) for k, v in tensors(step).items())
    assert torch.equal(loaded.optimizer["a/exp_avg"], tensors(step)["a"] / 2)


def prepared(root: Path) -> Path:
    for step in KEPT_BEFORE:
        save(root, step, keep=-1)
    return root


def check_after_a_fault(root: Path) -> bool:
    """Look as a resumed run does; return whether the new checkpoint is there."""
    durable.tidy(root)
    newest = checkpoint.load_latest(root)
    assert newest is not None
    assert newest.state.step in (OLD, NEW)
    check(root, newest.state.step)
    for step in (BEST, OLD):
        check(root, step)
    steps = {checkpoint.step_of(path) for path in root.iterdir()}
    assert steps <= {*KEPT_BEFORE, NEW}, "nothing half-written is left"
    assert len(whole_steps(root)) == len(steps), "what has a step's name is whole"
    if newest.state.step == OLD:
        check(root, 5)
    return newest.state.step == NEW


def calls_of_a_save(folder: Path) -> int:
    prepared(folder)
    with shim.Shim().active() as counter:
        save(folder, NEW)
    assert sorted(p.name for p in folder.iterdir()) == [
        checkpoint.folder_name(step) for step in (BEST, OLD, NEW)
    ]
    return counter.count


@pytest.mark.parametrize("way", WAYS)
def test_a_save_that_fails_at_any_call_leaves_good_checkpoints(tmp_path: Path, way: str) -> None:
    calls = calls_of_a_save(tmp_path / "counted")
    assert calls > 45
    new, refused = 0, 0
    for k in range(1, calls + 1):
        root = prepared(tmp_path / f"at_{k}")
        if way in shim.EXITING:
            assert shim.run_stopped(lambda root=root: save(root, NEW), root, way, k)
        else:
            refused += refuses(root, way, k)
        new += check_after_a_fault(root)
    assert 0 < new < calls
    if way in shim.RAISING:
        assert refused > calls // 3
    print(f"{way}: stopped at {calls} calls, {new} times behind the rename; 0 bad loads")


def refuses(root: Path, way: str, k: int) -> bool:
    """Save where a call fails; True if that was said, with path and bytes, False if it got by."""
    try:
        with shim.Shim(way, k).active():
            save(root, NEW)
    except CheckpointError as error:
        text = str(error)
        assert text.startswith(f"{root / checkpoint.folder_name(NEW)}: ")
        assert "\n" not in text
        if "cannot be written" in text:
            needed = r"it needs 0.0 MiB, [\d,]+\.\d MiB are free on /"
            assert re.search(needed, text) and text.endswith("set run.storage")
        return True
    check(root, NEW)
    return False


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.exact if way in {"killed", "torn"} else ())
        for way in WAYS
    ],
)
def test_a_result_that_is_replaced_is_the_old_or_the_new_one(tmp_path: Path, way: str) -> None:
    """Exported weights: two files, in place of two others, stopped at every call."""

    def write(folder: Path, text: bytes) -> None:
        with durable.whole_folder(folder) as place:
            for name in ("weights", "config"):
                durable.write(place / name, [text, text])

    def at(k: int, way: str = way) -> Callable[[], object]:
        folder = tmp_path / f"at_{k}" / "adapter"
        write(folder, b"old")
        return lambda: write(folder, b"new")

    with shim.Shim().active() as counter:
        at(0)()
    seen = set()
    for k in range(1, counter.count + 1):
        work = at(k)
        if way in shim.EXITING:
            shim.run_stopped(work, tmp_path / f"at_{k}", way, k)
        else:
            refused(work, way, k)
        durable.tidy(tmp_path / f"at_{k}")
        (folder,) = (tmp_path / f"at_{k}").iterdir()
        found = {path.read_bytes() for path in folder.iterdir()}
        assert len(found) == 1 and len(list(folder.iterdir())) == 2
        seen |= found
    assert seen == {b"oldold", b"newnew"}


def refused(work: Callable[[], object], way: str, k: int) -> bool:
    try:
        with shim.Shim(way, k).active():
            work()
    except OSError:
        return True
    return False


def test_a_limit_of_the_system_is_told_with_path_and_bytes(tmp_path: Path) -> None:
    """The kernel itself refuses: no file of this process may be longer than 100 KB."""
    root = prepared(tmp_path)
    big = {"a": torch.zeros(2**20)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(root, TrainState(step=NEW), big, big, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"{root}/step_000010: cannot be written (File too large): it needs 8.0 MiB" in str(
        caught.value
    )
    assert not check_after_a_fault(root)


def test_a_thousand_flipped_bits_are_a_thousand_found(tmp_path: Path) -> None:
    for step in (OLD, NEW):
        save(tmp_path, step)
    files = sorted((tmp_path / checkpoint.folder_name(NEW)).iterdir())
    seed = int(os.environ.get("FAULT_SEED", "0"))
    chance = random.Random(seed)
    told: list[str] = []
    for _ in range(1000):
        path = chance.choices(files, [max(200, file.stat().st_size) for file in files])[0]
        good = path.read_bytes()
        place = chance.randrange(len(good))
        bad = bytes([good[place] ^ (1 << chance.randrange(8))])
        path.write_bytes(good[:place] + bad + good[place + 1 :])
        found = checkpoint.load_latest(tmp_path, told.append)
        assert found is not None and found.state.step == OLD, (seed, path.name, place)
        with pytest.raises(CheckpointError):
            checkpoint.load(path.parent)
        path.write_bytes(good)
    assert len(told) == 1000 and all("step_000010" in line for line in told)
    check(tmp_path, NEW)
