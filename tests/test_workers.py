"""Two Ray Train workers give the result of one at the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.exact]


def test_two_workers_equal_one(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    """ZeRO-2 over gloo; float32, so only the order of additions differs. Dropout draws differ
    between ranks by design and is off here."""
    results = {}
    for name, overrides in {
        "one": ["run.workers=1", "train.accumulation=4"],
        "two": ["run.workers=2", "train.accumulation=2"],
    }.items():
        recipe = runs.write_recipe(tmp_path, tiny_model, chats, name)
        runs.train(recipe, "lora.dropout=0.0", "train.max_steps=6", *overrides)
        folder = tmp_path / "runs" / name
        results[name] = (list(read_jsonl(folder / "metrics.jsonl")), runs.adapter_of(folder))
        # 3 windows in each of 3 epochs, of which the estimate made two, however many workers
        assert 0 < RunFolder(folder).info()["windows_made"] <= 7
    one, two = results["one"], results["two"]
    assert [e["rows"] for e in one[0]] == [e["rows"] for e in two[0]]
    assert [e["loss"] for e in one[0]] == pytest.approx([e["loss"] for e in two[0]], rel=1e-5)
    assert one[1].keys() == two[1].keys()
    for name, tensor in one[1].items():
        # per tensor, not per element: Adam magnifies the rounding of gradients near its epsilon
        difference = torch.linalg.norm(tensor - two[1][name]) / torch.linalg.norm(tensor)
        assert difference < 1e-4, name
