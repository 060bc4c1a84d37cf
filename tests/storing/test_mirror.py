"""Mirror and fetching: a run goes to a real S3 server and comes back, whole or not at all."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.storing import fetching
from raytune_ft.storing.mirror import Mirror
from raytune_ft.storing.places import Place
from raytune_ft.training.run_folder import RunFolder, append_jsonl
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState

KEEP = 2


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "here/a1")
    folder.path.mkdir(parents=True)
    folder.update(name="a1", status="running", model_folder=str(tmp_path))
    folder.recipe.write_text("model: {}\n")
    return folder


@pytest.fixture
def place(bucket: str) -> Place:
    return Place(f"{bucket}/runs/a1")


def save(run: RunFolder, step: int, *, best: int = 0) -> Path:
    state = TrainState(step=step, best_step=best)
    weights = {"w": torch.full((64,), float(step))}
    return checkpoint.save(run.checkpoints, state, weights, {"m": torch.zeros(2)}, keep=KEEP)


def mirror_of(run: RunFolder, place: Place, *, patience_s: float = 0.0) -> Mirror:
    return Mirror(run, place, place.address, KEEP, patience_s=patience_s)


def steps_of(place: Place) -> set[str]:
    return {name.split("/")[1] for name in place.names("checkpoints")}


def within(seconds: float, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def fetched(place: Place, folder: Path, told: list[str]) -> RunFolder:
    shutil.rmtree(folder, ignore_errors=True)
    run = RunFolder(folder)
    fetching.bring(place, run, to_train=True, tell=told.append)
    return run


def test_a_run_comes_back_as_it_is(run: RunFolder, place: Place, tmp_path: Path) -> None:
    with mirror_of(run, place) as mirror:
        for step in (1, 2, 3):
            append_jsonl(run.metrics, {"step": step})
            save(run, step)
            mirror.send()
        (run.path / "ray/x").mkdir(parents=True)
        (run.path / "ray/x/y").write_text("of this machine")
        (run.path / ".lock").write_text("")
        (run.path / "tensorboard").mkdir()
        (run.path / "tensorboard/events").write_text("e")
    assert steps_of(place) == {"step_000002", "step_000003"}, "as many as checkpoint.keep says"
    assert not [name for name in place.names() if name.startswith(("ray", ".lock"))]
    back = fetched(place, tmp_path / "there/a1", [])
    newest = checkpoint.latest(back.checkpoints)
    assert newest is not None and newest.name == "step_000003"
    assert [p.name for p in checkpoint.step_folders(back.checkpoints)] == ["step_000003"]
    for name in ("run.json", "recipe.yaml", "metrics.jsonl", "tensorboard/events"):
        assert (back.path / name).read_bytes() == (run.path / name).read_bytes()
    for file in newest.iterdir():
        assert file.read_bytes() == (run.checkpoints / newest.name / file.name).read_bytes()


def test_the_best_checkpoint_stays_and_comes_along(
    run: RunFolder, place: Place, tmp_path: Path
) -> None:
    with mirror_of(run, place) as mirror:
        for step in (1, 2, 3, 4):
            save(run, step, best=1)
            mirror.send()
    assert steps_of(place) == {"step_000001", "step_000003", "step_000004"}
    back = fetched(place, tmp_path / "there/a1", [])
    assert {p.name for p in checkpoint.step_folders(back.checkpoints)} == {
        "step_000001", "step_000004",
    }  # fmt: skip


def test_a_half_sent_checkpoint_is_not_taken(
    run: RunFolder, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network goes away at each file of the second checkpoint in turn."""
    mirror = mirror_of(run, place)
    append_jsonl(run.metrics, {"step": 1})
    save(run, 1)
    mirror.send()
    append_jsonl(run.metrics, {"step": 2})
    last = save(run, 2)
    real, count = Place.send, len(list(last.iterdir()))
    for allowed in range(count):
        left = [allowed]

        def send(self: Place, local: Path, name: str, left: list[int] = left) -> None:
            if name.startswith("checkpoints/"):
                if not left[0]:
                    raise CheckpointError("no connection")
                left[0] -= 1
            real(self, local, name)

        monkeypatch.setattr(Place, "send", send)
        with pytest.raises(CheckpointError):
            mirror.send()
        back = fetched(place, tmp_path / "there/a1", [])
        newest = checkpoint.latest(back.checkpoints)
        assert newest is not None and newest.name == "step_000001"
    monkeypatch.setattr(Place, "send", real)
    mirror_of(run, place).send(everything=True)  # another driver finds what the first one left
    newest = checkpoint.latest(fetched(place, tmp_path / "there/a1", []).checkpoints)
    assert newest is not None and newest.name == "step_000002"


def test_a_manifest_is_there_only_behind_the_lines_up_to_it(
    run: RunFolder, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = Place.send

    def send(self: Place, local: Path, name: str) -> None:
        order.append(name)
        real(self, local, name)

    monkeypatch.setattr(Place, "send", send)
    append_jsonl(run.metrics, {"step": 1})
    save(run, 1)
    mirror_of(run, place).send()
    manifest = order.index("checkpoints/step_000001/manifest.json")
    assert order.index("metrics.jsonl") < manifest
    files = [n for n, name in enumerate(order) if name.startswith("checkpoints/")]
    assert manifest == max(files)


def test_damage_on_the_way_is_found_and_the_one_before_is_taken(
    run: RunFolder, place: Place, tmp_path: Path
) -> None:
    with mirror_of(run, place) as mirror:
        for step in (1, 2):
            save(run, step)
            mirror.send()
    place.write("checkpoints/step_000002/weights.safetensors", b"\0" * 8)
    told: list[str] = []
    back = fetched(place, tmp_path / "there/a1", told)
    newest = checkpoint.latest(back.checkpoints)
    assert newest is not None and newest.name == "step_000001"
    assert any(line.startswith("step_000002: 'weights.safetensors'") for line in told)


def test_training_does_not_wait_for_a_network_that_is_away(
    run: RunFolder, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent is tried again; one line says so, however often."""
    real, away, tries = Place.send, threading.Event(), [0]
    away.set()

    def send(self: Place, local: Path, name: str) -> None:
        tries[0] += 1
        if away.is_set():
            raise CheckpointError("s3://x: no connection to the server")
        real(self, local, name)

    monkeypatch.setattr(Place, "send", send)
    monkeypatch.setattr("raytune_ft.storing.mirror.RETRY_S", (0.05, 0.1))
    said: list[str] = []
    with mirror_of(run, place, patience_s=5.0) as mirror:
        mirror.say = said.append
        save(run, 1)
        within(20, lambda: tries[0] > 3)
        assert not place.names()
        away.clear()
        within(20, lambda: "step_000001" in steps_of(place))
    assert len(said) == 1
    assert said[0].startswith("s3://x: no connection to the server; training goes on")


def test_what_cannot_be_sent_at_the_end_is_an_error(
    run: RunFolder, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("no rights")

    save(run, 1)
    monkeypatch.setattr(Place, "send", refuse)
    message = rf"^{place.address}: the run could not be sent there to its end \(no rights\); it s"
    with pytest.raises(CheckpointError, match=message), mirror_of(run, place):
        pass
    with pytest.raises(ZeroDivisionError), mirror_of(run, place):
        raise ZeroDivisionError  # what ended the run is told, not that it was not sent


def test_a_checkpoint_removed_while_it_is_sent_leaves_nothing(
    run: RunFolder, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = Place.send, save(run, 1)

    def send(self: Place, local: Path, name: str) -> None:
        real(self, local, name)
        if local.parent == folder:
            shutil.rmtree(folder)

    monkeypatch.setattr(Place, "send", send)
    mirror_of(run, place).send()
    assert place.names("checkpoints") == []


def test_the_one_that_is_further_counts(run: RunFolder, place: Place, tmp_path: Path) -> None:
    """A run killed before it sent its last checkpoint goes on from it where it lies."""
    mirror = mirror_of(run, place)
    save(run, 1)
    mirror.send()
    there = fetched(place, tmp_path / "there/a1", [])
    save(there, 2)
    append_jsonl(there.metrics, {"step": 2})
    fetching.bring(place, there, to_train=True, tell=lambda _: None)
    assert checkpoint.latest(there.checkpoints) == there.checkpoints / "step_000002"
    assert there.metrics.is_file(), "older files do not take its place"
    save(run, 2)
    save(run, 3)
    mirror.send()
    fetching.bring(place, there, to_train=True, tell=lambda _: None)
    assert checkpoint.latest(there.checkpoints) == there.checkpoints / "step_000003"


def test_another_checkpoint_of_the_same_step_is_sent_again(run: RunFolder, place: Place) -> None:
    save(run, 1)
    mirror_of(run, place).send()
    shutil.rmtree(run.checkpoints)
    checkpoint.save(run.checkpoints, TrainState(step=1), {"w": torch.ones(3)}, {}, keep=KEEP)
    mirror_of(run, place).send()
    name = "checkpoints/step_000001/weights.safetensors"
    assert place.read(name) == (run.path / name).read_bytes()
