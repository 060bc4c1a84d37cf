"""A shipped recipe of eight GPUs by its own command: eight Ray Train workers end as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests import runs
from tests.conftest import write_chats

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

NAME = "internlm_7b_qlora_moss_sft_all_e2_gpu8"
LOSS, WEIGHTS = 1e-6, 2e-5
"""As tests/training/test_eight_ranks.py has them."""
TINY = (
    "model.template=default", "model.quantization=none", "lora.r=4", "lora.alpha=8",
    "lora.dropout=0.0", "data.fill={}", "data.system=''", "data.max_length=96", "data.window=64",
    "train.epochs=1", "train.lr=5.0e-3", "train.log_every=1", "chat_eval.every=null",
    "run.trackers=[]",
)  # fmt: skip


def train(*overrides: str) -> None:
    """Run the recipe's own command; eight workers import on as few cores as there are."""
    process = runs.start(Path(NAME), *overrides)
    try:
        _, said = process.communicate(timeout=840)
    finally:
        process.terminate()
    assert process.returncode == 0, said


def test_eight_workers_of_ray_train_equal_one(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 150)
    found = {}
    for name, overrides in {
        "eight": [],
        "one": ["run.workers=1", "train.accumulation=8"],
    }.items():
        train(
            *TINY, f"model.path={tiny_model}", f"data.sources=[{{path: {rows}}}]",
            f"run.storage={tmp_path / 'runs'}", f"run.name={name}", *overrides,
        )  # fmt: skip
        folder = RunFolder(tmp_path / "runs" / name)
        found[name] = (list(read_jsonl(folder.metrics)), runs.adapter_of(folder.path))
    (eight, its), (one, expected) = found["eight"], found["one"]
    assert [len(line["rank_seconds"]) for line in eight] == [8, 8, 8]
    assert [line["rows"] for line in eight] == [line["rows"] for line in one]
    assert [line["loss"] for line in eight] == pytest.approx([e["loss"] for e in one], rel=LOSS)
    for name, weight in expected.items():
        off = torch.linalg.norm(weight - its[name]) / torch.linalg.norm(weight)
        assert float(off) <= WEIGHTS, name
