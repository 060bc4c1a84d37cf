"""The objectives on the real command: plain text to go on pre-training with, and shipped pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.config.loader import load_recipe
from raytune_ft.training.run_folder import read_json, read_jsonl
from tests import runs
from tests.conftest import ROOT, WORDS


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exact
def test_plain_text_is_learned_as_a_whole(tiny_model: Path, tmp_path: Path) -> None:
    """A text file, a document a line, some longer than a pack: no template, no token left out."""
    lines = [" ".join(WORDS[(i + k) % 10] for k in range(3 + i * 7 % 90)) for i in range(24)]
    text = tmp_path / "book.txt"
    text.write_text("\n".join(lines) + "\n")
    recipe = runs.write_recipe(tmp_path, tiny_model, text, "text")
    runs.train(
        recipe, "data.over_length=split", "train.epochs=2", "train.lr=2e-2",
        "checkpoint.every=epoch",
    )  # fmt: skip
    run = tmp_path / "runs" / "text"
    record = read_json(run / "data.json")
    assert (record["used"], record["rows"]) == (24, 24) and record["split"] > 0
    assert record["formats"][0].startswith("text (by column text")
    metrics = list(read_jsonl(run / "metrics.jsonl"))
    first = [line for line in metrics if line["epoch"] == 0]
    rows = [row for line in first for row in line["rows"]]
    assert sorted(set(rows)) == list(range(24)) and len(rows) > 24
    # of each stretch nothing comes before the first token; all others are learned
    assert sum(line["tokens"] - line["targets"] for line in first) == len(rows)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert any(bool(tensor.any()) for n, tensor in runs.adapter_of(run).items() if "lora_B" in n)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exact
def test_the_shipped_pairs_are_preferred(tiny_model: Path, tmp_path: Path) -> None:
    """`quickstart_dpo.yaml` as it is, but for the model, its tokens and the run's place."""
    runs.train(
        ROOT / "configs" / "quickstart_dpo.yaml",
        f"model.path={tiny_model}", "model.quantization=none", "data.max_length=1024",
        "data.validation=0.2", "train.lr=1e-2", "chat_eval.max_new_tokens=2",
        f"run.storage={tmp_path}", "run.name=polite",
    )  # fmt: skip
    metrics = list(read_jsonl(tmp_path / "polite" / "metrics.jsonl"))
    assert metrics[0]["rewards_accuracy"] == 0.5 and metrics[0]["rewards_margin"] == 0.0
    held_out = [line for line in metrics if line["val_loss"] is not None]
    assert held_out[-1]["val_rewards_accuracy"] > 0.8
    assert held_out[-1]["val_loss"] < 0.69
    report = (tmp_path / "polite" / "report.html").read_text()
    assert "rewards_accuracy" in report or "rewards accuracy" in report


def test_the_shipped_pairs_are_forty_and_each_prefers_the_shorter_answer() -> None:
    assert load_recipe("quickstart_dpo.yaml").train.objective == "dpo"
    lines = (ROOT / "configs" / "data" / "polite_pairs.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 40
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in rows)
