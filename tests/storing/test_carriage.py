"""Carriage: what a worker without the run's folder gets and sends, through a real actor."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.storing import carriage
from raytune_ft.storing.carriage import HomeFolder, HomeMirror, Ties, Way, at_hand
from raytune_ft.storing.home import PULSES, Home
from raytune_ft.training.guarding import failures
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.guarding.pulse import Pulse
from raytune_ft.training.guarding.watchdog import Place, Watchdog
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.saving.load_from import Begin
from raytune_ft.training.worker import Job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("started")]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The driver's folder."""
    folder = RunFolder(tmp_path / "drivers/a1")
    folder.path.mkdir(parents=True)
    folder.update(name="a1", status="running", plan=1)
    folder.recipe.write_text("model: {}\n")
    failures.begin(folder)
    return folder


@pytest.fixture
def way(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Way:
    """The way to a folder that this node does not have: its nonce is not what lies here."""
    import ray

    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "node"))
    home = ray.remote(Home).options(num_cpus=0, max_concurrency=8).remote(str(run.path))
    return Way(str(run.path), "of another machine", home)


def save(run: RunFolder, step: int) -> Path:
    weights = {"w": torch.full((1 << 20,), float(step))}
    return checkpoint.save(run.checkpoints, TrainState(step=step), weights, {}, keep=2)


def job_of(run: RunFolder, model: Path, **changes: Any) -> Job:
    recipe = {
        "chat_eval": {"mmlu": []}, "checkpoint": {"keep": 2}, "model": {"path": str(model)},
    }  # fmt: skip
    return replace(Job(recipe, str(run.path), str(model), 3), **changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (1 << 16))  # two blocks
    return folder


def test_a_folder_that_is_here_is_used_as_it_is(run: RunFolder, model: Path) -> None:
    own = carriage.way_of(run)
    assert own.home is None, "there is but one node"
    with at_hand(own) as place:
        assert place.is_homes and place.run.path == run.path
        seen: list[Job] = []
        place.train(job_of(run, model), 0, seen.append)
    assert seen == [job_of(run, model)]
    with pytest.raises(CheckpointError, match="does not have the run's folder"):
        at_hand(replace(own, nonce="another")).__enter__()


def test_what_rank_0_writes_comes_home(run: RunFolder, way: Way, model: Path) -> None:
    save(run, 1)

    def work(job: Job) -> None:
        there = RunFolder(job.run_path)
        assert there.path != run.path
        assert checkpoint.latest(there.checkpoints) == there.checkpoints / "step_000001"
        assert there.info()["plan"] == 1
        run.update(windows_made=7)  # the driver writes run.json meanwhile
        for step in (2, 3):
            append_jsonl(there.metrics, {"step": step})
            save(there, step)
        there.update(fast_path=["x"])
        there.adapter.mkdir()
        (there.adapter / "w").write_text("trained")
        there.log.write_text("of the worker")

    run.log.write_text("of the driver")
    with at_hand(way) as place:
        place.train(job_of(run, model), 0, work)
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None and newest.name == "step_000003"
    assert [p.name for p in checkpoint.step_folders(run.checkpoints)] == [
        "step_000002", "step_000003",
    ]  # fmt: skip
    assert [e["step"] for e in read_jsonl(run.metrics)] == [2, 3]
    assert (run.adapter / "w").read_text() == "trained"
    assert run.log.read_text() == "of the driver"
    assert (run.path / "logs/rank_0.log").read_text() == "of the worker"
    info = run.info()
    assert (info["windows_made"], info["fast_path"], info["plan"]) == (7, ["x"], 1)
    assert not list(run.checkpoints.glob(".*")), "nothing half is left"


def test_what_the_driver_says_meanwhile_is_not_lost(run: RunFolder, way: Way, model: Path) -> None:
    with run.lines.open("a", buffering=1) as said:
        said.write("start workers\n")

        def work(job: Job) -> None:
            there = RunFolder(job.run_path)
            there.lines.write_text("of the worker's node\n")
            said.write("step 1\n")

        with at_hand(way) as place:
            place.train(job_of(run, model), 0, work)
        said.write("done\n")
    assert run.lines.read_text() == "start workers\nstep 1\ndone\n"


def test_another_start_goes_on_from_what_came_home(run: RunFolder, way: Way, model: Path) -> None:
    """What a killed worker had not sent is nowhere else: every node takes the driver's newest."""
    save(run, 1)
    with at_hand(way) as place:
        save(place.run, 2)
        seen: list[str] = []

        def work(job: Job) -> None:
            found = checkpoint.step_folders(RunFolder(job.run_path).checkpoints)
            seen.extend(p.name for p in found)

        place.train(job_of(run, model), 1, work)
    assert seen == ["step_000001"]


def test_another_rank_gets_the_checkpoint_that_rank_0_wrote(run: RunFolder, way: Way) -> None:
    """As the best one at the end, which ranks of other nodes have never seen."""
    with at_hand(way) as place:
        saved = save(run, 2)
        loaded = checkpoint.load(place.run.checkpoints / saved.name)
    assert loaded.state.step == 2


def test_a_worker_of_an_earlier_start_is_refused(run: RunFolder, way: Way) -> None:
    import ray

    first = HomeFolder(way.home, ray.get(way.home.begin.remote(carried=True)))
    second = HomeFolder(way.home, ray.get(way.home.begin.remote(carried=True)))
    second.write("metrics.jsonl", b"new")
    with pytest.raises(CheckpointError, match="a later start of this run's workers writes it"):
        first.write("metrics.jsonl", b"old")
    assert run.metrics.read_bytes() == b"new"


def test_a_folder_that_is_carried_to_is_written_by_nobody_else(run: RunFolder, way: Way) -> None:
    """As a killed driver's worker may do for a moment, on any node."""
    import ray

    ray.get(way.home.begin.remote(carried=True))
    ray.get(way.home.begin.remote(carried=True))
    with pytest.raises(CheckpointError, match="another process trains this run"):
        only_writer(run.path, patience_s=0.2).__enter__()
    ray.get(way.home.begin.remote(carried=False))
    with only_writer(run.path, patience_s=0.2):
        pass


def test_a_half_carried_checkpoint_is_not_there(run: RunFolder, way: Way, tmp_path: Path) -> None:
    import ray

    other = RunFolder(tmp_path / "other/a1")
    other.path.mkdir(parents=True)
    other.update(name="a1")
    folder = save(other, 5)
    home = HomeFolder(way.home, ray.get(way.home.begin.remote(carried=True)))
    home.send(folder / "weights.safetensors", "checkpoints/step_000005/weights.safetensors")
    assert checkpoint.step_folders(run.checkpoints) == []
    assert home.names() == ["failures.jsonl", "recipe.yaml", "run.json"]
    assert [path.name for path in run.checkpoints.iterdir()] != []
    home = HomeFolder(way.home, ray.get(way.home.begin.remote(carried=True)))
    assert list(run.checkpoints.iterdir()) == []
    mirror = HomeMirror(other, home, 2)
    mirror.settle()
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "step_000005"


def test_files_that_a_node_has_are_not_fetched(way: Way, model: Path) -> None:
    assert carriage.here(str(model), way.home) == model
    assert carriage.here(str(model / "config.json"), way.home) == model / "config.json"


def test_models_and_files_come_once_and_whole(
    way: Way, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node where nothing, or something else, is at the driver's path."""
    monkeypatch.setattr(carriage, "_has", lambda *_: False)
    came = carriage.here(str(model), way.home)
    assert came.is_relative_to(tmp_path / "node")
    for name in ("config.json", "model.safetensors"):
        assert (came / name).read_bytes() == (model / name).read_bytes()
    before = (came / "config.json").stat().st_mtime_ns
    assert carriage.here(str(model), way.home) == came
    assert (came / "config.json").stat().st_mtime_ns == before, "once per node"
    one = carriage.here(str(model / "config.json"), way.home)
    assert one.name == "config.json" and one.read_text() == "{}"


def test_what_changes_on_the_way_is_refused(
    way: Way, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(carriage, "_has", lambda *_: False)
    ray.get(way.home.listing.remote(str(model)))
    (model / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json: did not come whole from the driver's node"):
        carriage.here(str(model), way.home)
    assert not [p for p in (tmp_path / "node/fetched").iterdir() if p.is_dir()]


def test_a_job_is_told_with_this_nodes_paths(
    run: RunFolder, way: Way, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.path / "beginning").mkdir()
    (run.path / "beginning/adapter_config.json").write_text("{}")
    asked = job_of(run, model, begin=Begin(str(run.path / "beginning"), "adapter"))
    asked.recipe["chat_eval"]["mmlu"] = [str(model / "config.json")]
    seen: list[Job] = []
    monkeypatch.setattr(carriage, "_has", lambda *_: False)
    with at_hand(way) as place:
        place.train(asked, 1, seen.append)
    (told,) = seen
    assert told.base == str(model), "the result names the driver's"
    assert told.begin is not None
    files = told.recipe["chat_eval"]["mmlu"]
    for path in (told.run_path, told.model_folder, told.begin.path, *files):
        assert Path(path).is_relative_to(place.run.path.parents[2]) and Path(path).exists()


def test_failures_reach_the_driver_at_once(run: RunFolder, way: Way) -> None:
    append_jsonl(run.path / failures.FILE, {"words": "earlier", "rank": 1, "step": 0, "kind": "",
                                            "fatal": False, "attempt": 1})  # fmt: skip

    def work() -> None:
        raise CheckpointError("no room")

    with at_hand(way) as place:
        assert failures.last(place.run) is not None, "earlier ones are known"
        failures.guard(work, place.run, 3)
    fatal = failures.fatal(run)
    assert isinstance(fatal, CheckpointError) and str(fatal) == "no room"


def test_ranks_that_do_not_see_each_other_know_that_others_work(
    run: RunFolder, way: Way, tmp_path: Path
) -> None:
    """One waits far longer than its limit while the other beats; then both stop, and both end."""
    ended: list[int] = []
    said: list[str] = []
    busy, idle = Pulse(), Pulse()
    folders = [tmp_path / f"node_{k}" / PULSES for k in range(2)]

    def dog(rank: int, pulse: Pulse) -> Watchdog:
        place = Place(folders[rank], rank, 2, 77)

        def end(_code: int) -> None:
            ended.append(rank)

        return Watchdog(place, pulse, 3.0, lambda line, _step: said.append(line), end)

    with Ties(way.home, folders[0]), Ties(way.home, folders[1]):
        dogs = [dog(0, busy), dog(1, idle)]
        for each in dogs:
            each.__enter__()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.1):
                busy.beat()

        thread = threading.Thread(target=beat)
        thread.start()
        time.sleep(6)
        assert not ended, "somebody works"
        stop.set()
        thread.join()
        deadline = time.monotonic() + 60
        while sorted(ended) != [0, 1]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for each in dogs:
            each.stop()
    assert any("no worker went on for 3 s (rank 0: start, rank 1: start)" in line for line in said)
