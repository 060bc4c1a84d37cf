"""A sweep on its way to a store: whatever stands there at any moment can be taken up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError
from raytune_ft.new_run import new_folder
from raytune_ft.storing import fetching, steps
from raytune_ft.storing.places import Beat, Place
from raytune_ft.sweeping.folder import mirrored, open_sweep
from raytune_ft.sweeping.sending import SweepMirror
from raytune_ft.sweeping.trials import Ledger, name_of
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState

KEEP = 1
LAST = 4
ELSEWHERE = {"host": "another-host", "pid": 7, "began": "boot 1"}


class Shelf(Place):
    """A store on this disk, which tells of each change; its power may be cut at any of them."""

    def __init__(self, path: Path, changed: Callable[[], object] = lambda: None) -> None:
        self.path, self.address, self.changed = path, str(path), changed

    def __truediv__(self, name: str) -> Shelf:
        return Shelf(self.path / name, self.changed)

    def names(self, prefix: str = "") -> list[str]:
        found = (self.path / prefix).rglob("*")
        return sorted(p.relative_to(self.path).as_posix() for p in found if p.is_file())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content)
        self.changed()

    def send(self, local: Path, name: str, beat: Beat = lambda _: None) -> None:
        self.write(name, local.read_bytes())

    def fetch(self, name: str, local: Path, beat: Beat = lambda _: None) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.path / name, local)

    def delete(self, prefix: str) -> None:
        for name in self.names(prefix) or [prefix]:
            (self.path / name).unlink(missing_ok=True)
            self.changed()


class Sweep:
    """The driver of a sweep without training: folders and ledger as trials leave them."""

    def __init__(self, path: Path) -> None:
        self.run = RunFolder(path)
        self.run.path.mkdir(parents=True)
        self.ledger = Ledger(self.run.path)
        (self.run.path / steps.LEDGER).touch()
        self.run.recipe.write_text("model: {}\n")
        self.run.update(name="s", status="running", driver=ELSEWHERE)

    def trial(self, number: int) -> RunFolder:
        return RunFolder(self.run.path / steps.TRIALS / name_of(number))

    def start(self, number: int) -> None:
        self.ledger.started(number)
        folder = self.trial(number)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.update(name=name_of(number), status="running")

    def step(self, number: int, step: int, weight: float = 0.0) -> None:
        folder = self.trial(number)
        append_jsonl(folder.metrics, {"step": step, "loss": 1.0})
        state = TrainState(step=step)
        weights = {"w": torch.full((8,), weight or number + step / 10)}
        checkpoint.save(folder.checkpoints, state, weights, {}, keep=KEEP)

    def end(self, number: int) -> None:
        folder = self.trial(number)
        folder.adapter.mkdir()
        (folder.adapter / "w").write_text(f"trained {number}")
        folder.update(status="done")
        self.ledger.ended("done", number, metric=1.0, step=LAST)

    def keep(self) -> None:
        (self.run.path / "best").mkdir()
        (self.run.path / "best/w").write_text("trained")
        (self.run.path / "best.yaml").write_text("model: {}\n")
        self.run.update(status="done", best=0)


def whole_life(sweep: Sweep, send: Callable[[], object]) -> None:
    """Take a sweep of four trials to its end, its mirror looking at every turn."""

    def turn(work: Callable[..., object], *what: Any) -> None:
        work(*what)
        send()

    turn(sweep.ledger.planned, [{"x": 0}, {"x": 1}, {"x": 2}])
    for number in (0, 1):
        turn(sweep.start, number)
        for step in range(1, LAST + 1):
            turn(sweep.step, number, step)
            if step == 2:
                turn(sweep.ledger.rung, number, step, 1.0)
        turn(sweep.end, number)
    turn(sweep.start, 2)
    turn(sweep.step, 2, 1)
    sweep.ledger.ended("stopped", 2, metric=1.0, step=1)
    # between two looks, as of a search that asks while it goes on
    sweep.ledger.planned([{"x": 3}])
    sweep.start(3)
    sweep.step(3, LAST)
    turn(sweep.end, 3)
    turn(sweep.keep)


def check(shelf: Path, sweep: Sweep) -> None:
    """See that what stands there can be taken up."""
    names = Shelf(shelf).names()
    here = (sweep.run.path / steps.LEDGER).read_bytes()
    there = (shelf / steps.LEDGER).read_bytes() if steps.LEDGER in names else b""
    assert here.startswith(there) and (not there or there.endswith(b"\n"))
    events = [json.loads(line) for line in there.splitlines()]
    planned = {e["trial"] for e in events if e["event"] == "planned"}
    sent = {int(name.split("/")[1][-4:]) for name in names if name.startswith("trials/")}
    assert sent <= planned, "no folder of which the ledger knows nothing"
    for number in (e["trial"] for e in events if e["event"] == "done"):
        trial = RunFolder(shelf / steps.TRIALS / name_of(number))
        assert trial.info()["status"] == "done"
        assert (trial.adapter / "w").read_text() == f"trained {number}"
        assert [e["step"] for e in read_jsonl(trial.metrics)][-1] == LAST
    for event in (e for e in events if e["event"] == "rung"):
        own = [n for n in names if n.startswith(f"trials/{name_of(event['trial'])}/checkpoints")]
        assert steps.last_whole(steps.steps_in(n.split("/", 2)[2] for n in own)) >= event["step"]
    if fetching.RUN_JSON in names:
        assert steps.LEDGER in names
        if RunFolder(shelf).info()["status"] == "done":
            assert there == here and (shelf / "best/w").is_file()


def test_whenever_the_power_goes_it_can_be_taken_up(tmp_path: Path) -> None:
    sweep, changes = Sweep(tmp_path / "here/s"), []
    shelf = tmp_path / "there/s"

    def changed() -> None:
        changes.append(1)
        check(shelf, sweep)

    mirror = SweepMirror(sweep.run, Shelf(shelf, changed), KEEP, every_s=0.0)
    whole_life(sweep, mirror.send)
    mirror.settle()
    assert len(changes) > 80
    place = Shelf(shelf)
    assert place.read(steps.LEDGER) == (sweep.run.path / steps.LEDGER).read_bytes()
    kept = {n.split("/")[3] for n in place.names() if "trial_0000/checkpoints" in n}
    assert kept == {"step_000004"}, "checkpoint.keep holds for trials"
    assert not [n for n in place.names() if "/." in n or n.startswith(".")]


def test_a_checkpoint_goes_behind_the_line_that_says_why(tmp_path: Path) -> None:
    """As another trial may go on from it until that line, which was written in the meantime."""
    sweep, meanwhile = Sweep(tmp_path / "here/s"), [False]
    shelf = tmp_path / "there/s"

    def changed() -> None:
        if meanwhile[0]:
            meanwhile[0] = False
            sweep.ledger.started(1)
            sweep.step(1, 3)  # KEEP is 1

    def there() -> tuple[set[str], int]:
        names = Shelf(shelf).names(f"trials/{name_of(1)}/checkpoints")
        begun = Shelf(shelf).read(steps.LEDGER).count(b'"started", "trial": 1')
        return {name.split("/")[3] for name in names}, begun

    mirror = SweepMirror(sweep.run, Shelf(shelf, changed), KEEP, every_s=0.0)
    sweep.ledger.planned([{"x": 0}, {"x": 1}])
    for number in (0, 1):
        sweep.start(number)
        sweep.step(number, 2)
    mirror.settle()
    sweep.step(0, 3)
    meanwhile[0] = True
    mirror.send()
    assert there() == ({"step_000002", "step_000003"}, 1)
    mirror.send()
    assert there() == ({"step_000003"}, 2)


def test_taken_up_anywhere_it_is_sent_on(tmp_path: Path) -> None:
    """From each state that stood there: fetched, gone on with to the end, it is the same."""
    sweep, states = Sweep(tmp_path / "here/s"), []
    shelf = tmp_path / "there/s"
    mirror = SweepMirror(sweep.run, Shelf(shelf), KEEP, every_s=0.0)

    def send() -> None:
        mirror.send()
        states.append(shutil.copytree(shelf, tmp_path / f"state{len(states)}"))

    whole_life(sweep, send)
    for number, state in enumerate(states[::5]):
        other = RunFolder(tmp_path / f"other{number}/s")
        fetching.bring(Shelf(state), other, to_train=True, tell=fetching.silent)
        ledger = Ledger.read(other.path)
        for trial in ledger.trials.values():
            own = RunFolder(trial.folder)
            if trial.state == "done":
                assert (own.adapter / "w").is_file()
            elif trial.state == "running" and trial.step:
                newest = checkpoint.latest(own.checkpoints)
                assert newest is not None and checkpoint.step_of(newest) >= trial.step
        on = SweepMirror(other, Shelf(state), KEEP, every_s=0.0)
        ledger.planned([{"x": 9}])
        on.send()
        assert Shelf(state).read(steps.LEDGER) == (other.path / steps.LEDGER).read_bytes()


def test_what_changes_of_trials_that_were_over_is_sent(tmp_path: Path) -> None:
    """As their reports, which a driver on another machine writes at the end of all."""
    sweep, sent = Sweep(tmp_path / "here/s"), []
    sweep.ledger.planned([{"x": 0}])
    sweep.start(0)
    sweep.step(0, LAST)
    sweep.end(0)
    sweep.ledger.planned([{"x": "what no recipe may have"}])
    sweep.ledger.ended("failed", 1, metric=None, step=0, reason="it has no folder")
    shelf = Shelf(tmp_path / "there/s")
    SweepMirror(sweep.run, shelf, KEEP).settle()
    other = RunFolder(tmp_path / "other/s")
    fetching.bring(shelf, other, to_train=True, tell=fetching.silent)
    counted = Shelf(shelf.path, lambda: sent.append(1))
    mirror = SweepMirror(other, counted, KEEP)
    mirror.send()
    (other.path / f"trials/{name_of(0)}/report.html").write_text("new")
    mirror.settle()
    assert shelf.read(f"trials/{name_of(0)}/report.html") == b"new"
    beside = len([name for name in shelf.names() if "/" not in name and name != steps.LEDGER])
    assert len(sent) == beside + 1, "nothing else of it goes again"


def test_another_checkpoint_under_the_same_name_is_sent(tmp_path: Path) -> None:
    """As of a trial that goes on with another one's weights."""
    sweep, shelf = Sweep(tmp_path / "here/s"), Shelf(tmp_path / "there/s")
    mirror = SweepMirror(sweep.run, shelf, KEEP, every_s=0.0)
    sweep.ledger.planned([{"x": 0}])
    sweep.start(0)
    sweep.step(0, 2, 5.0)
    mirror.settle()
    sweep.step(0, 2, 7.0)
    mirror.send()
    name = f"trials/{name_of(0)}/checkpoints/step_000002/weights.safetensors"
    assert shelf.read(name) == (sweep.run.path / name).read_bytes()


def test_the_ledger_tells_which_copy_counts(tmp_path: Path) -> None:
    sweep, shelf = Sweep(tmp_path / "first/s"), Shelf(tmp_path / "there/s")
    sweep.ledger.planned([{"x": 0}, {"x": 1}])
    sweep.start(0)
    sweep.step(0, 2)
    SweepMirror(sweep.run, shelf, KEEP).settle()

    def fetched(name: str, *, to_train: bool = True) -> RunFolder:
        run = RunFolder(tmp_path / name / "s")
        told: list[str] = []
        fetching.bring(shelf, run, to_train=to_train, tell=told.append)
        (run.path / "left").write_text("by this copy's driver")
        return run

    reader = fetched("reader", to_train=False)
    assert not (reader.path / f"trials/{name_of(0)}/checkpoints").exists()
    fetched("reader", to_train=True)
    assert (reader.path / f"trials/{name_of(0)}/checkpoints/step_000002").is_dir()

    second = fetched("second")
    ours = Ledger.read(second.path)
    ours.started(0)
    fetching.bring(shelf, second, to_train=True, tell=pytest.fail)
    assert (second.path / "left").is_file(), "what is further here counts"

    sweep.ledger.started(1)
    SweepMirror(sweep.run, shelf, KEEP).settle()
    fetching.bring(shelf, second, to_train=True, tell=fetching.silent)
    assert (second.path / steps.LEDGER).read_bytes() == shelf.read(steps.LEDGER)
    assert not (second.path / "left").exists(), "another driver has gone on from what it had sent"


def recipe(bucket: str, **train: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}]}, "train": train,
        "tune": {"space": {"lora.r": [1, 2]}}, "run": {"name": "s1", "storage": f"{bucket}/runs"},
    })  # fmt: skip


def test_a_sweep_on_s3_is_begun_and_taken_up(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raytune_ft.config import loader

    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "lost"))
    asked = recipe(bucket)
    folder = open_sweep(asked, "quickstart", None)
    assert folder is not None and folder.path.is_relative_to(tmp_path / "lost")
    with mirrored(folder, KEEP):
        folder.create("s1", loader.dump_yaml(asked), model_folder=str(tmp_path))
        folder.update(driver=ELSEWHERE)
        Ledger(folder.path).planned([{"lora.r": 1}, {"lora.r": 2}])
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "other"))
    address = f"{bucket}/runs/s1"
    for resume in (None, address):
        again = open_sweep(asked, "quickstart", resume)
        assert again is not None and again.path.is_relative_to(tmp_path / "other")
        assert len(Ledger.read(again.path).trials) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[-1] == f"{address}: goes on with this sweep, which began before"
    with pytest.raises(CheckpointError, match=rf"^{bucket}/runs/none: no run is kept there"):
        open_sweep(asked, "quickstart", f"{bucket}/runs/none")
    (again.path / "best.yaml").write_text("lora: {r: 1}\n")
    again.update(status="done")
    with mirrored(again, KEEP):
        pass
    assert fetching.file_of(f"{address}/best.yaml").read_text() == "lora: {r: 1}\n"
    with pytest.raises(CheckpointError, match=rf"^{address}/none.yaml: no such file there"):
        fetching.file_of(f"{address}/none.yaml")
    assert open_sweep(asked, "quickstart", None) is None
    assert f"{address}: this sweep is finished" in capsys.readouterr().err
    assert new_folder(recipe(bucket).model_copy(
        update={"run": asked.run.model_copy(update={"name": "s2"})}
    ), "quickstart").path.is_dir()  # fmt: skip
