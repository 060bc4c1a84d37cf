"""A whole run under ZeRO-3: answers on the way, checkpoints and the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.schema import Recipe
from tests.conftest import write_chats
from tests.training.test_worker import train


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_shards_its_weights_ends_as_one_that_does_not(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    ends = [run_of(zero, method, tiny_model, tmp_path) for zero in ("none", "zero3")]
    (weights, events), (expected, told) = ends
    assert weights.keys() == expected.keys() and len(expected) > 10
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    answers, losses = (
        [[e[field] for e in some if e["kind"] == kind] for some in (events, told)]
        for kind, field in (("sample", "answer"), ("step", "loss"))
    )
    assert len(answers[1]) == 3 and answers[0] == answers[1]
    assert len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def run_of(
    zero: str, method: str, model: Path, folder: Path
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Train three steps; return the result's tensors and the run's events."""
    rows = write_chats(folder / "rows.jsonl", 40)
    recipe = Recipe.model_validate({
        "model": {"path": str(model), "method": method},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
        "train": {"epochs": 1, "max_steps": 3, "accumulation": 2, "lr": 1e-3, "deepspeed": zero},
        "chat_eval": {"every": 2, "prompts": ["question 1 about red?"], "max_new_tokens": 6},
        "checkpoint": {"every": 1},
        "run": {"trackers": []},
    })  # fmt: skip
    events: list[dict[str, Any]] = []
    run = train(recipe, folder / zero, events)
    result = run.adapter if method == "lora" else run.model
    return load_file(next(iter(sorted(result.glob("*.safetensors"))))), events
