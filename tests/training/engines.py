"""Engines to test: an adapter on the tiny model, and ragged batches for it."""

from __future__ import annotations

from pathlib import Path

import torch

from raytune_ft.config.schema import LoraSection, Recipe
from raytune_ft.model import adapter, loading
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training import presets
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine, State, TorchEngine, ZeroEngine
from tests.training.ragged import batches, targets

CPU = torch.device("cpu")


def recipe(folder: Path, accumulation: int, zero: str, dtype: str = "float32") -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(folder), "dtype": dtype},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {
            "micro_batch_size": 1, "accumulation": accumulation, "lr": 1e-2, "max_norm": 0.05,
            "weight_decay": 0.01, "deepspeed": zero,
        },
    })  # fmt: skip


def build(folder: Path, accumulation: int, zero: str, dtype: str = "float32") -> Engine:
    """A LoRA engine on the tiny model; its B matrices are not zero, so every gradient counts."""
    chosen = recipe(folder, accumulation, zero, dtype)
    model = loading.load_model(folder, chosen.model, CPU)
    model = adapter.attach(model, LoraSection(r=4, alpha=8, dropout=0.0), 1)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    computed = loading.compute_dtype(chosen.model, CPU)
    config = presets.resolve(chosen, computed, on_gpu=False)
    if config is None:
        return TorchEngine(TokenLoss(model), CPU, chosen.train, computed)
    return ZeroEngine(TokenLoss(model), CPU, chosen.train, config)


def advance(engine: Engine, step: list[TensorBatch], rank: int = 0, world: int = 1) -> float | None:
    for batch in step[rank::world]:
        engine.forward_backward(batch, targets(step))
    return engine.step(1e-2)


def close(one: State, other: State, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def after_all_steps(engine: Engine) -> tuple[State, list[float]]:
    norms = [float(advance(engine, step) or 0.0) for step in batches()]
    return engine.weights(), norms
