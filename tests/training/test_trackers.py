"""Trackers through their own libraries, offline: what was sent is read back from what they keep."""

from __future__ import annotations

import json
import struct
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import Interrupted, RecipeError
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.watching import trackers
from raytune_ft.training.watching.recording import RunWriter, grouped, recorded
from raytune_ft.training.watching.trackers import Beginning, Trackers
from tests.training.made_runs import recipe_of, step_line

SECRETS = {
    "WANDB_API_KEY": "k" * 40, "HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "aws_secret",
}  # fmt: skip
ADDRESS = "https://me:pass_secret@data.example/rows.jsonl?X-Amz-Signature=sig_secret#frag_secret"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def recipe_with(*names: str) -> Recipe:
    return recipe_of("demo", run={"trackers": list(names)}, data={"sources": [{"path": ADDRESS}]})


def attempt(
    folder: RunFolder, recipe: Recipe, steps: range, *, status: str = "done", samples: bool = True
) -> list[dict[str, Any]]:
    """Record steps as a worker does that begins, or goes on, before the first of them."""
    shown: list[dict[str, Any]] = []
    random = np.random.default_rng(0)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.cut_after(steps.start - 1)
    writer = RunWriter(folder, recipe, shown.append)
    writer("stage", name="train", step=steps.start - 1, total=9, exact=True, share=0.0)
    if samples and steps.start == 1:
        writer("sample", step=0, when="before", prompt="Who?", answer="<b>I</b>", kind="greedy")
    for step in steps:
        val = {"val_loss": 1.0 / step} if step % 2 == 0 else {}
        writer("step", **step_line(step, 9, random, loss=10.0 / step, **val))
    writer("mmlu", step=steps[-1], name="mmlu_test", average=25.0 + steps[-1], questions=4)
    writer.trackers.finish(status)
    return shown


def warnings(shown: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in shown if event["kind"] == "warning"]


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def no_secret_in(folder: Path) -> None:
    content = all_bytes(folder)
    assert b"data.example/rows.jsonl" in content, "the address itself is sent"
    for secret in (*SECRETS.values(), "pass_secret", "sig_secret", "frag_secret"):
        assert secret.encode() not in content, secret


def wandb_records(folder: Path) -> tuple[set[str], dict[str, Any], dict[int, list[dict[str, Any]]]]:
    """Read the run files that wandb keeps offline: ids, config, what was logged by step."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    ids, config, history = set(), {}, defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("history"):
                items = {
                    (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
                history[items["_step"]].append(items)
    return ids, config, history


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path: Path) -> None:
    """Killed behind step 5, taken up from the checkpoint of step 3: steps 4 and 5 come again."""
    pytest.importorskip("wandb")
    folder, recipe = RunFolder(tmp_path / "demo"), recipe_with("wandb")
    told = [f"wandb: kept offline; wandb sync {folder.path}/wandb/offline-run-* sends it"]
    assert warnings(attempt(folder, recipe, range(1, 6), status="failed")) == told
    assert warnings(attempt(folder, recipe, range(4, 8))) == told
    ids, config, history = wandb_records(folder.path)
    assert len(ids) == 1 and config["train.lr"] == 2e-4 and config["model.path"] == "models/tiny"
    losses = [
        (s, i["train/loss"]) for s, found in history.items() for i in found if "train/loss" in i
    ]
    assert sorted(losses) == [(step, 10.0 / step) for step in range(1, 8)], "no step twice"
    held_out = {s: i["val/loss"] for s, found in history.items() for i in found if "val/loss" in i}
    assert held_out == {2: 0.5, 4: 0.25, 6: pytest.approx(1 / 6)}
    pages = list(folder.path.glob("wandb/*/files/media/html/answers/*.html"))
    assert [page.read_text() for page in pages] == [
        "<pre>before\n\nWho?\n\n&lt;b&gt;I&lt;/b&gt;</pre>"
    ]
    no_secret_in(folder.path)


def test_mlflow_keeps_a_run_in_a_file_and_goes_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    folder, recipe = RunFolder(tmp_path / "demo"), recipe_with("mlflow")
    assert warnings(attempt(folder, recipe, range(1, 6), status="stopped")) == []
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raytune_ft")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("KILLED", "demo")
    assert warnings(attempt(folder, recipe, range(4, 8))) == []
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.lr"] == "0.0002"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, 10.0 / step) for step in range(1, 8)]
    accuracy = client.get_metric_history(run.info.run_id, "mmlu/mmlu_test")
    assert [(m.step, m.value) for m in accuracy] == [(5, 30.0), (7, 32.0)]
    texts = list(tmp_path.glob("mlflow_artifacts/*/artifacts/answers/1_greedy/step_000000.txt"))
    assert [text.read_text() for text in texts] == ["before\n\nWho?\n\n<b>I</b>"]
    no_secret_in(tmp_path)


def board_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does: a new start at a step voids later ones before it."""
    from tensorboardX.proto import event_pb2

    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    paths = sorted(folder.glob("tensorboard/events*"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths:
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack("<Q", data[place : place + 8])
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16
            if event.session_log.status == 1:
                for points in found.values():
                    points[:] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag].append((event.step, value.simple_value))
    return found


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    folder, recipe = RunFolder(tmp_path / "demo"), recipe_with("tensorboard")
    attempt(folder, recipe, range(1, 6))
    attempt(folder, recipe, range(4, 8))
    losses = board_scalars(folder.path)["train/loss"]
    assert losses == [(step, pytest.approx(10.0 / step)) for step in range(1, 8)]


class Broken:
    """Works for a while."""

    forgets, note = False, ""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.logged: list[int] = []

    def start(self, beginning: Beginning) -> str | None:
        if self.fails_at == "start":
            raise OSError("no route to host\nsecond line")
        return "id"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.fails_at == "log" and step == 3:
            raise RuntimeError("quota exceeded")
        self.logged.append(step)

    def text(self, step: int, key: str, words: str) -> None:
        """Nothing to keep."""

    def finish(self, status: str) -> None:
        if self.fails_at == "finish":
            raise TimeoutError("gone")


@pytest.mark.parametrize(
    ("fails_at", "line"),
    [
        ("start", "mlflow: OSError: no route to host second line; the run goes on without it, "),
        ("log", "mlflow: RuntimeError: quota exceeded; the run goes on without it, "),
        ("finish", "mlflow: TimeoutError: gone; the run goes on without it, "),
    ],
)
def test_a_tracker_that_fails_is_left_out_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, line: str
) -> None:
    bad, good = Broken(fails_at), Broken("never")
    monkeypatch.setitem(trackers.KINDS, "mlflow", lambda: bad)
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda: good)
    folder = RunFolder(tmp_path / "demo")
    shown = attempt(folder, recipe_with("mlflow", "wandb"), range(1, 6))
    assert warnings(shown) == [line + "metrics.jsonl has every step"]
    assert [line["step"] for line in read_jsonl(folder.metrics)] == [1, 2, 3, 4, 5]
    assert good.logged == [1, 2, 3, 4, 5, 5], "the other one has all, and the MMLU figures"


def test_a_tracker_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()

    class Hanging(Broken):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            hang.wait(60)

    monkeypatch.setitem(trackers.KINDS, "wandb", lambda: Hanging("never"))
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 4)
    shown = attempt(RunFolder(tmp_path / "demo"), recipe_with("wandb"), range(1, 9), samples=False)
    hang.set()
    assert [event["step"] for event in shown if event["kind"] == "step"] == list(range(1, 9))
    assert warnings(shown) == [
        "wandb: 4 figures wait to be sent; more are left out",
        "wandb: still sending after 0 s; left behind",
    ]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "done"), (ValueError(), "failed"), (Interrupted("x"), "stopped")]
)
def test_trackers_are_told_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, status: str
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(Trackers, "finish", lambda _self, said: ends.append(said))
    folder = RunFolder(tmp_path)
    if error is None:
        with recorded(folder, recipe_with(), lambda _: None) as emit:
            emit("stage", name="load model")
    else:
        with pytest.raises(type(error)), recorded(folder, recipe_with(), lambda _: None):
            raise error
    assert ends == [status]


def test_a_library_that_is_missing_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trackers.util.find_spec
    monkeypatch.setattr(
        trackers.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    trackers.check_installed(["tensorboard"])
    with pytest.raises(RecipeError, match=r"^run\.trackers: wandb needs wandb, not installed here"):
        trackers.check_installed(["tensorboard", "wandb"])


def test_figures_are_grouped_and_what_is_none_or_no_number_is_left_out() -> None:
    fields = step_line(3, 9, np.random.default_rng(0), val_loss=0.5, mfu=None, loss=float("nan"))
    names = set(grouped(fields))
    assert {"train/lr", "val/loss", "speed/tokens_per_s", "ranks/slowest_seconds"} <= names
    assert {"memory/memory_gib", "memory/rss_gib", "train/grad_norm"} <= names
    assert not {"speed/mfu", "train/loss", "train/exact", "train/step"} & names


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (ADDRESS, "https://data.example/rows.jsonl"),
        ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("read https://a.b/c?token=1 and d@e.f", "read https://a.b/c and d@e.f"),
        ("models/llama@main?x", "models/llama@main?x"),
    ],
)
def test_addresses_lose_what_may_be_a_secret(words: str, left: str) -> None:
    assert trackers.without_secrets(words) == left
