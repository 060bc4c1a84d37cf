"""A whole run of one worker on a tiny model: taken up again it ends with the same bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, make_feed
from raytune_ft.errors import CheckpointError, Interrupted
from raytune_ft.training import worker
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.guarding.interruption import AskedToEnd
from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl, write_json
from raytune_ft.training.watching.throughput import MOMENTARY
from raytune_ft.training.worker import Job
from tests import runs


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Forty chats and two rows without one, dropout on: three epochs of four or five steps."""
    from tests.conftest import write_chats

    rows = write_chats(tmp_path_factory.mktemp("rows") / "train.jsonl", 40)
    with rows.open("a") as file:
        file.write('{"messages": []}\nno json\n')
    return Recipe.model_validate({
        "model": {"path": str(tiny_model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(rows)}], "max_length": 96, "window": 16, "on_error": "skip",
        },
        "train": {
            "epochs": 3, "accumulation": 4, "lr": 5e-3, "deepspeed": "none", "warmup_steps": 4,
        },
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None},
        "run": {"trackers": []},
    })  # fmt: skip


def feed_of(recipe: Recipe) -> Feed:
    source = sources.open_sources(recipe.data, recipe.train.seed)
    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    return make_feed(source, Encoder.of(recipe, tokenizer), recipe.train.seed)


def train(
    recipe: Recipe,
    folder: Path,
    events: list[dict[str, Any]] | None = None,
    guards: Guards = Guards(),  # noqa: B008, frozen
    **job: Any,
) -> RunFolder:
    """Run a worker to the end, as `preparation` and the trainer would."""
    feed = feed_of(recipe)
    run = RunFolder(folder)
    if not (run.path / "data.json").is_file():
        run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / "data.json", {"rows": 1, "used": 1, "formats": ["openai"], "steps": 9})
    told: list[dict[str, Any]] = [] if events is None else events

    def packs(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=recipe.train.epochs)

    values = {"expected_steps": 9, "sharing": 64, "data_fingerprint": "sha-1", **job}
    worker.run(
        Job(recipe.model_dump(mode="json"), str(run.path), recipe.model.path, **values),
        packs, None, told.append, guards,
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(recipe, tmp_path_factory.mktemp("whole") / "run")


def cut_back(whole: RunFolder, folder: Path, step: int) -> Path:
    """Copy a run as it stood when it was killed behind `step`'s checkpoint."""
    shutil.copytree(whole.path, folder)
    shutil.rmtree(folder / "adapter")
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.rpartition("_")[2]) > step:
            shutil.rmtree(path)
    return folder


def ledger(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of the metrics without what a clock or a machine says."""
    return [{k: v for k, v in e.items() if k not in MOMENTARY} for e in read_jsonl(run.metrics)]


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_taken_up_again_ends_with_the_same_bytes(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, step: int
) -> None:
    """In the warm-up and behind it, with dropout."""
    events: list[dict[str, Any]] = []
    folder = cut_back(whole, tmp_path / "run", step)
    again = train(recipe, folder, events)
    assert ledger(again) == ledger(whole)
    weights = "adapter/adapter_model.safetensors"
    assert runs.sha256(again.path / weights) == runs.sha256(whole.path / weights)
    assert read_json(again.path / "data.json") == read_json(whole.path / "data.json")
    (begun,) = (e for e in events if e.get("name") == "train")
    assert (begun["step"], begun["share"]) == (step, ledger(whole)[step - 1]["share"])


def test_a_run_that_gets_sigterm_stops_behind_its_step_and_ends_with_the_same_bytes(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    """It saves at its end alone otherwise; both parts are watched, which changes nothing."""
    seldom = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 100})}
    )

    class Killer(list[dict[str, Any]]):
        def append(self, event: dict[str, Any]) -> None:
            if event["kind"] == "step" and event["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            super().append(event)

    folder = tmp_path / "run"
    with AskedToEnd() as asked, pytest.raises(Interrupted, match=r"^stopped after step 3$"):
        train(seldom, folder, Killer(), Guards(interrupted=asked, watched=True))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
    again = train(seldom, folder, guards=Guards(watched=True))
    assert ledger(again) == ledger(whole)
    weights = "adapter/adapter_model.safetensors"
    assert runs.sha256(again.path / weights) == runs.sha256(whole.path / weights)
    assert not (folder / "stacks").exists()


def test_the_rates_in_the_metrics_are_the_closed_formula_of_their_progress(
    whole: RunFolder, recipe: Recipe
) -> None:
    lines = ledger(whole)
    ends = [line["progress"] / 3 for line in lines]
    assert ends == sorted(ends) and ends[-1] == 1.0
    warm = ends[3]
    expected = [5e-3 * (step + 1) / 4 for step in range(4)]
    expected += [
        5e-3 * (1 + math.cos(math.pi * (end - warm) / (1 - warm))) / 2 for end in ends[3:-1]
    ]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_record_of_rows_is_that_of_one_whole_epoch(whole: RunFolder) -> None:
    record = read_json(whole.path / "data.json")
    assert (record["rows"], record["used"]) == (42, 40)
    assert record["dropped"] == {"empty": 1, "unusable": 1}
    assert record["exact"] is True and record["visited"] == 1.0
    assert record["formats"] == ["openai"], "what was known before stays"
    first = [line for line in ledger(whole) if line["epoch"] == 0]
    tokens = sum(line["tokens"] for line in first)
    assert record["density"] == pytest.approx(tokens / (96 * record["packs"]), abs=1e-4)
    assert record["steps"] == len(ledger(whole))
    assert sum(len(line["rows"]) for line in first) == 40


def test_lost_rows_are_told_of_once_before_and_after_a_resume(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    late = cut_back(whole, tmp_path / "run", len(ledger(whole)) - 1)
    events: list[dict[str, Any]] = []
    train(recipe, late, events)
    assert [e for e in events if e["kind"] == "rows"] == []
    assert read_json(late / "data.json")["dropped"] == {"empty": 1, "unusable": 1}


def test_a_finished_run_is_exported_again_and_nothing_more(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.path, folder)
    shutil.rmtree(folder / "adapter")
    events: list[dict[str, Any]] = []
    again = train(recipe, folder, events)
    assert ledger(again) == ledger(whole)
    assert [e for e in events if e["kind"] == "step"] == []
    weights = "adapter/adapter_model.safetensors"
    assert runs.sha256(again.path / weights) == runs.sha256(whole.path / weights)


def test_other_rows_or_another_step_are_refused_and_leave_the_run_as_it_was(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    folder = cut_back(whole, tmp_path / "run", 3)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"train.jsonl have changed since this run began"):
        train(recipe, folder, data_fingerprint="sha-2")
    wider = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 3})})
    advice = r"set run.workers=2 train.micro_batch_size=1 train.accumulation=2$"
    with pytest.raises(CheckpointError, match=advice):
        train(wider, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_what_makes_packs_ahead_is_ended_with_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """`max_steps` ends a run inside an epoch, with packs still to come."""
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    feed, ended = feed_of(short), []

    def packs(start: Position) -> Iterator[Placed]:
        try:
            yield from iter_packs(feed, start)
        finally:
            ended.append(start)

    (tmp_path / "data.json").write_text(json.dumps({"rows": 0}))
    job = Job(short.model_dump(mode="json"), str(tmp_path), short.model.path, 1)
    worker.run(replace(job, sharing=64), packs, None, lambda _: None)
    assert ended == [Position()]
    record = read_json(tmp_path / "data.json")
    assert record["exact"] is False and 0 < record["visited"] < 1
