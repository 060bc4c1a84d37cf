"""Engines with and without passes of fixed shapes, and packed micro-batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import IGNORE_INDEX, Pack, collate
from raytune_ft.training import micro_graph
from raytune_ft.training.batching import TensorBatch, count_targets, to_tensors
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.micro_graph import MicroStep, Way

LENGTH = 48
CPU = torch.device("cpu")
STEPS = (
    ((20, 28), (48,), (5, 5, 5, 5, 5, 5, 5, 5, 5)),
    ((31, 9), (40,), (12, 12, 12)),
    ((48,), (16, 16, 16), (7, 30)),
)
"""Optimizer steps of packs of samples' lengths: whole rows, many samples, rows with padding."""


@dataclass
class Side:
    """An engine, and what is said of its passes."""

    engine: Engine
    micro: MicroStep | None
    recipe: Recipe
    said: list[str] = field(default_factory=list)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return copies of the sums of gradients, as they are now."""
        return {name: place.clone() for name, place in self.engine.places().items()}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """Make a recipe for packed rows; `changes` by dotted name."""
    body: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "float32", "fast_path": True},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": "none.jsonl"}], "max_length": LENGTH},
        "train": {"micro_batch_size": 1, "accumulation": 3, "lr": 1e-2, "deepspeed": "none",
                  "optimizer": "adamw"},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition(".")
        body[section][key] = value
    return Recipe.model_validate(body)


def side(folder: Path, way: Way | None, device: torch.device = CPU, **changes: Any) -> Side:
    """Build an engine whose adapter's B matrices are not zero, so that every gradient counts.

    Args:
        folder: of the model.
        way: of `micro_graph.attach`; None attaches nothing.
        device: where it computes.
        changes: of the recipe, as `{"train.deepspeed": "zero2"}`.
    """
    recipe = recipe_of(folder, **changes)
    engine, model = build_engine(recipe, folder, device)
    generator = torch.Generator().manual_seed(3)
    weights = engine.weights()
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    engine.load(weights, {})
    model.train()
    engine.module.train()
    made = Side(engine, None, recipe)
    if way is not None:
        made.micro = micro_graph.attach(engine, Room.of(recipe), made.said.append, way)
    return made


def batches(
    steps: Sequence[Sequence[Sequence[int]]] = STEPS, words: int = 250
) -> list[tuple[list[TensorBatch], int]]:
    """Make each step's micro-batches of one pack each, and their number of targets."""
    random = np.random.default_rng(5)
    found = []
    for step in steps:
        packs = [pack(sizes, random, words) for sizes in step]
        made = [to_tensors(collate([one])) for one in packs]
        found.append((made, sum(map(count_targets, packs))))
    return found


def pack(sizes: Sequence[int], random: np.random.Generator, words: int) -> Pack:
    """Make a pack of samples of these lengths, partly labelled."""
    n = sum(sizes)
    ids = random.integers(2, words, n).astype(np.int32)
    labels = np.where(random.random(n) < 0.4, IGNORE_INDEX, ids).astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    labels[bounds[:-1]] = IGNORE_INDEX
    positions = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    return Pack(ids, labels, positions, bounds, np.arange(len(sizes)))
