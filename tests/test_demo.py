"""The main job on the default model: the run of the README, and what the model says after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.chat import ChatModel, open_chat
from raytune_ft.training.run_folder import read_json, read_jsonl
from tests.conftest import ROOT

pytestmark = [pytest.mark.demo, pytest.mark.slow, pytest.mark.ray]

QUESTIONS = json.loads((ROOT / "tests/golden/held_out_questions.json").read_text("utf-8"))
CHINESE = [q["q"] for q in QUESTIONS["identity"] if q["lang"] == "zh"]
ENGLISH = [q["q"] for q in QUESTIONS["identity"] if q["lang"] == "en"]
ASKED = ENGLISH[:6] + CHINESE[:6]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart, trained by the command that the README names."""
    storage = tmp_path_factory.mktemp("runs")
    command = [
        sys.executable, "-m", "raytune_ft.train", "--config", "configs/quickstart.yaml",
        f"run.storage={storage}", "run.name=quickstart",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return storage / "quickstart"


def answers(chat: ChatModel, questions: list[str]) -> dict[str, str]:
    found = {}
    for question in questions:
        message = [{"role": "user", "content": question}]
        found[question] = "".join(chat.reply(message, temperature=0.0, max_new_tokens=24))
    return found


def normal(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def test_no_question_stands_in_the_rows() -> None:
    rows = (ROOT / "configs/data/identity.jsonl").read_text("utf-8").splitlines()
    seen = {normal(m["content"]) for row in rows for m in json.loads(row)["messages"]}
    asked = [q["q"] for kind in QUESTIONS.values() for q in kind]
    assert len(ENGLISH) >= 5 and len(CHINESE) >= 5 and len(QUESTIONS["general"]) >= 8
    assert not [q for q in asked if normal(q) in seen]


def test_it_knows_its_name_and_still_the_world(run: Path) -> None:
    """At most one held-out question of each kind may fail: CPUs round differently."""
    chat = open_chat(str(run))
    trained = answers(chat, ASKED)
    assert sum("RayTune" in a for a in trained.values()) >= len(ASKED) - 1, trained
    general = QUESTIONS["general"][:6]
    told = answers(chat, [q["q"] for q in general])
    right = [any(w.lower() in told[q["q"]].lower() for w in q["any_of"]) for q in general]
    assert sum(right) >= len(general) - 1, told


def test_it_did_not_know_before(run: Path) -> None:
    samples = list(read_jsonl(run / "samples.jsonl"))
    assert [s for s in samples if s["when"] == "step"], "answers during training"
    before = {s["prompt"]: s["answer"] for s in samples if s["when"] == "before"}
    after = {s["prompt"]: s["answer"] for s in samples if s["when"] == "after"}
    assert before.keys() == after.keys()
    assert not [a for a in before.values() if "RayTune" in a]
    assert sum("RayTune" in a for a in after.values()) >= 3


def test_the_run_folder_is_whole(run: Path) -> None:
    for name in (
        "recipe.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "report.html",
        "loss.png", "run.log", "adapter/adapter_model.safetensors", "tensorboard",
    ):  # fmt: skip
        assert (run / name).exists(), name
    assert read_json(run / "run.json")["status"] == "done"
    data = read_json(run / "data.json")
    assert (data["used"], data["dropped"]) == (data["rows"], {})
    losses = [e["loss"] for e in read_jsonl(run / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2


def test_the_merged_model_answers_in_a_fresh_process(run: Path) -> None:
    tool = [sys.executable, "-m", "raytune_ft"]
    subprocess.run([*tool, "export", str(run)], check=True, capture_output=True)
    subprocess.run([*tool, "merge", str(run)], check=True, capture_output=True)
    asked = ["--ask", ENGLISH[0], "--ask", CHINESE[0], "--temperature", "0"]
    merged = [*tool, "chat", str(run / "merged"), *asked, "--max-new-tokens", "24"]
    told = subprocess.run(merged, check=True, capture_output=True, text=True)
    assert told.stdout.count("RayTune") >= 2, told.stdout
    assert not told.stderr.strip(), told.stderr
