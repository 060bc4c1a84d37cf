"""What the plan takes for replayed from CUDA graphs is what passes of an engine are fixed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.estimates.pace import is_replayed
from raytune_ft.config.estimates.setting import Setting
from raytune_ft.model.loading import read_config
from raytune_ft.model.memory import Shape
from tests.training.micro import batches, side

ZERO = {"train.deepspeed": "zero2", "model.dtype": "bfloat16"}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "zero2": (ZERO, True),
    "zero1": (ZERO | {"train.deepspeed": "zero1"}, True),
    "zero2, one pass": (ZERO | {"train.accumulation": 1}, False),
    "zero2, float32": ({"train.deepspeed": "zero2"}, False),
    "recomputed": ({"model.gradient_checkpointing": True}, True),
    "noise": ({"train.neftune_noise_alpha": 5.0}, False),
    "loose rows": ({"data.pack": "none"}, False),
    "dpo": ({"train.objective": "dpo"}, False),
    "no fast path": ({"model.fast_path": False}, False),
    "dora": ({"lora.use_dora": True}, False),
}


@pytest.mark.parametrize(("changes", "expected"), CASES.values(), ids=CASES)
def test_the_plan_and_the_run_agree(
    tiny_model: Path, changes: dict[str, Any], expected: bool
) -> None:
    one = side(tiny_model, "fixed", **changes)
    if one.micro is not None:  # the first pass is watched
        step, n_targets = batches()[0]
        one.engine.forward_backward(step[0], n_targets)
    assert (one.micro is not None and not one.micro.refused) == expected
    counts = Shape(read_config(tiny_model)).counts(one.recipe)
    assert is_replayed(Setting(one.recipe, counts, on_gpu=True)) == expected
