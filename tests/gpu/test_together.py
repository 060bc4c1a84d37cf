"""Trials on one base on the device, by the fast path: a step of each is as if it were alone.

Two layers as wide as a 7B model's, NF4 and bfloat16 as its recipes ship it, and float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack, collate
from raytune_ft.model import fast
from raytune_ft.training.batching import to_tensors
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.step import seed_step
from raytune_ft.training.together.base import build_engines
from tests.conftest import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
LENGTH = 512
TRIALS = ((16, 32, 0.1), (8, 8, 0.0), (64, 16, 0.3))
"""Rank, alpha and dropout of each."""
ALLOWED = {("none", "float32"): 1e-4, ("nf4", "bfloat16"): 3e-2}
"""Relative, of all of an adapter's gradient: float32 sums in another order (TF32 is off), roundings
of bfloat16 in two layers. Another trial's masks or rows would be off by a third and more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, **SHAPE)
    return folder


def recipe_of(model: Path, trial: tuple[int, int, float], kind: tuple[str, str]) -> Recipe:
    r, alpha, dropout = trial
    return Recipe.model_validate({
        "model": {"path": str(model), "quantization": kind[0], "dtype": kind[1],
                  "fast_path": True, "gradient_checkpointing": 1},
        "lora": {"r": r, "alpha": alpha, "dropout": dropout},
        "data": {"sources": [{"path": "none.jsonl"}], "max_length": LENGTH},
        "train": {"layout": "recipe", "deepspeed": "none"},
    })  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    import numpy as np

    rng = np.random.default_rng(3)
    packs = []
    for middle in (200, 77):
        ids = rng.integers(5, 250, LENGTH).astype(np.int32)
        positions = np.concatenate([np.arange(middle), np.arange(LENGTH - middle)])
        bounds = np.array([0, middle, LENGTH], np.int32)
        packs.append(Pack(ids, ids.copy(), positions.astype(np.int32), bounds, np.arange(2)))
    return to_tensors(collate(packs))


def begin(engine: Engine, seed: int) -> None:
    """Give B matrices values, without which those of A have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in engine.trained.items():
        if "lora_B" in name:
            drawn = torch.randn(weight.shape, generator=generator) * 0.02
            weight.data.copy_(drawn)


def gradient(engine: Engine) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for p in engine.trained.values()]).cpu()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ALLOWED)
def test_a_step_of_each_is_as_if_alone(model: Path, kind: tuple[str, str]) -> None:
    recipes = [recipe_of(model, trial, kind) for trial in TRIALS]
    given, targets = batch(), 1000
    expected = []
    for number, recipe in enumerate(recipes):
        engine, _ = build_engine(recipe, model, CUDA)
        begin(engine, number)
        seed_step(42, 1)
        engine.module.train()
        alone = float(engine.forward_backward(given, targets))
        expected.append((alone, gradient(engine)))
        del engine
    engines, passes = build_engines(recipes, model, CUDA, len(recipes))
    assert fast.report_of(engines[0].module).counts["linear"] == 14
    for number, engine in enumerate(engines):
        begin(engine, number)
    passes.begin(engines)
    for engine, (loss, wanted) in zip(engines, expected, strict=True):
        passes.seats.sit(engine.number)
        seed_step(42, 1)
        engine.module.train()
        found = float(engine.forward_backward(given, targets))
        assert found == pytest.approx(loss, rel=ALLOWED[kind])
        mine = gradient(engine)
        assert float((mine - wanted).norm() / wanted.norm()) < ALLOWED[kind]
