"""Noise on embeddings: as large as the paper says, per segment, in training alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.model.noise import noise, segment_lengths
from raytune_ft.training.build import build_engine

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])


def test_each_token_knows_its_segment_s_length() -> None:
    expected = [[3, 3, 3, 2, 2, 1], [6, 6, 6, 6, 6, 6]]
    assert segment_lengths(SEGMENTS).tolist() == expected


def test_noise_is_uniform_up_to_the_paper_s_bound() -> None:
    """alpha / sqrt(L * d), the same for a packed sample as for that sample alone."""
    width, alpha = 4000, 5.0
    torch.manual_seed(1)
    drawn = noise(torch.zeros(2, 6, width), segment_lengths(SEGMENTS), alpha)
    for row, place, length in ((0, 0, 3), (0, 4, 2), (1, 5, 6)):
        bound = alpha / math.sqrt(length * width)
        found = drawn[row, place]
        assert 0.99 * bound < found.abs().max() <= bound
        assert abs(float(found.mean())) < 0.05 * bound
        assert float(found.var()) == pytest.approx(bound**2 / 3, rel=0.05)


def engine_of(folder: Path, alpha: float | None, **model: Any) -> Any:
    recipe = Recipe.model_validate({
        "model": {"path": str(folder), **model},
        "lora": {"r": 4, "dropout": 0.0},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {"deepspeed": "none", "neftune_noise_alpha": alpha},
    })  # fmt: skip
    return build_engine(recipe, folder, torch.device("cpu"))[0]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 250, (2, 6), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    return {
        "input_ids": ids, "labels": ids, "position_ids": positions, "segment_ids": SEGMENTS,
    }  # fmt: skip


def loss(engine: Any, seed: int) -> float:
    torch.manual_seed(seed)
    return float(engine.module(**batch())[0])


@pytest.mark.parametrize("again", [False, True])
def test_training_is_shaken_and_nothing_else(tiny_model: Path, again: bool) -> None:
    plain = engine_of(tiny_model, None)
    shaken = engine_of(tiny_model, 50.0, gradient_checkpointing=again)
    plain.module.eval()
    quiet = loss(plain, 1)
    shaken.module.eval()
    assert loss(shaken, 1) == quiet
    shaken.module.train()
    assert loss(shaken, 1) != quiet
    assert loss(shaken, 1) == loss(shaken, 1) != loss(shaken, 2)
    ids = batch()["input_ids"]
    with torch.no_grad():  # as an answer between two steps, before anything sets eval
        assert torch.equal(shaken.module.model(ids).logits, plain.module.model(ids).logits)
