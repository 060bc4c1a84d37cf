"""Steps for engines in tests: ragged micro-batches of the tiny model's ids."""

from __future__ import annotations

import torch

from raytune_ft.training.batching import TensorBatch, empty_batch


def batches() -> list[list[TensorBatch]]:
    """Make three steps of four micro-batches; the last of each has no label at all."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(3):
        step = []
        for length in (9, 30, 17):
            ids = torch.randint(2, 250, (1, length), generator=generator)
            labels = ids.clone()
            labels[:, : length // 3] = -100
            step.append({
                "input_ids": ids, "labels": labels,
                "position_ids": torch.arange(length).unsqueeze(0),
                "segment_ids": torch.zeros(1, length, dtype=torch.int64),
            })  # fmt: skip
        steps.append([*step, empty_batch()])
    return steps


def targets(step: list[TensorBatch]) -> int:
    """Count the labels of a step that are predicted."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
