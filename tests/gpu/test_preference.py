"""DPO and ORPO on a CUDA device: NF4 base, bfloat16, ZeRO-2 and plain torch; on a CPU in float32.

What is float64 on a CPU in `tests/model/test_preference_loss.py` is here in the types that people
train in: DPO begins at a margin of 0, on a CPU to the last bit, and the pairs are learned.

    pytest tests/gpu/test_preference.py -s        prints a line per run
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.data.places import iter_packs
from raytune_ft.training.batching import steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.vitals import measures, take_sums
from tests.gpu.test_zero import ON_CPU, ON_GPU
from tests.training.test_preference import recipe_of, write_pairs
from tests.training.test_worker import feed_of

EPOCHS = 12
PLACES = [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=ON_CPU)]


def recipe(model: Path, rows: Path, objective: str, zero: str, device: str) -> Recipe:
    made = recipe_of(model, rows, objective, deepspeed=zero, epochs=EPOCHS, accumulation=2)
    if device == "cpu":
        return made
    quantised = {"quantization": "nf4", "dtype": "bfloat16", "gradient_checkpointing": True}
    return made.model_copy(update={"model": made.model.model_copy(update=quantised)})


def train(engine: Engine, made: Recipe) -> list[dict[str, float]]:
    """Take every step; what each measured."""
    lines = []
    placed = iter_packs(feed_of(made), epochs=EPOCHS)
    for data in steps(placed, made.train, rank=0, workers=1):
        engine.module.train()
        loss = sum(float(engine.forward_backward(b, data.n_targets)) for b in data.micro_batches)
        sums = {name: float(value) for name, value in take_sums(engine.module).items()}
        assert engine.step(1e-2) is not None
        lines.append({"loss": loss / data.n_targets, **measures(engine.module, sums)})
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("zero", ["none", "zero2"])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_pairs_are_learned(
    tiny_model: Path, tmp_path: Path, objective: str, zero: str, device: str
) -> None:
    made = recipe(tiny_model, write_pairs(tmp_path / "pairs.jsonl", 16), objective, zero, device)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    engine, _ = build_engine(made, tiny_model, place)
    lines = train(engine, made)
    first, last = lines[0], lines[-1]
    print(f"\n{objective} {zero} {device}: {first} -> {last}")
    if objective == "dpo":
        # kernels of a GPU may differ with and without a gradient to come
        slack = 0.0 if device == "cpu" else 1e-2
        assert abs(first["rewards_margin"]) <= slack
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-5 + slack)
    assert last["rewards_accuracy"] > 0.9
    assert last["loss"] < first["loss"]
