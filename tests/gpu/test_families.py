"""Every family on a CUDA device: NF4 load, isolated packs, and five real training steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.loading import load_model
from raytune_ft.model.loss import TokenLoss
from tests.families.checkpoints import SPECS, make
from tests.families.loaded import CPU, difference, load, logits, random_ids
from tests.families.short_run import STEPS, recipe_of, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
FAMILIES = tuple(SPECS)


def load_cuda(folder: Path, **section: Any) -> Any:
    values = ModelSection.model_validate({"path": str(folder), **section})
    return load_model(folder, values, CUDA)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    """float32 without TF32, so that only the order of sums differs."""
    folder = make(family, tmp_path / family)
    ours = load_cuda(folder, dtype="float32")
    ids = random_ids(ours.config.get_text_config().vocab_size, 1, 24)
    expected = logits(load(folder, dtype="float32"), ids)
    assert difference(logits(ours, ids.to(CUDA)).to(CPU), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_stores_the_same_layers_and_agrees_in_bfloat16(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / family)
    ours = load_cuda(folder, quantization="nf4", dtype="bfloat16")
    plain = load(folder, dtype="float32")
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in plain.named_modules()]
    stored = {n for n, m in ours.named_modules() if "Linear4bit" in type(m).__name__}
    linear = {n for n, m in plain.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert stored, "nothing was quantised"
    assert linear - stored <= {"lm_head"}
    ids = random_ids(ours.config.get_text_config().vocab_size, 1, 24)
    exact = load_cuda(folder, quantization="nf4", dtype="float32")
    found = [logits(model, ids.to(CUDA)).float().flatten() for model in (ours, exact)]
    # weights rounded to bfloat16 before NF4 fall into other codes here and there
    assert torch.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_see_its_neighbour(family: str, tmp_path: Path) -> None:
    """The loss of the second sample is the same bits whatever the first one says."""
    folder = make(family, tmp_path / family)
    loss = TokenLoss(load_cuda(folder, dtype="bfloat16"))
    words = loss.model.config.get_text_config().vocab_size
    second = random_ids(words, 1, 20, seed=1)
    found = [_second_loss(loss, random_ids(words, 1, 12, seed=s), second) for s in (2, 3)]
    assert found[0] == found[1]


def _second_loss(loss: TokenLoss, first: torch.Tensor, second: torch.Tensor) -> float:
    ids = torch.cat([first, second], dim=1).to(CUDA)
    n, m = first.shape[1], second.shape[1]
    labels = torch.cat([torch.full((1, n), -100), second], dim=1).to(CUDA)
    labels[:, n] = -100
    positions = torch.cat([torch.arange(n), torch.arange(m)]).unsqueeze(0).to(CUDA)
    segments = torch.cat([torch.zeros(n), torch.ones(m)]).long().unsqueeze(0).to(CUDA)
    with torch.no_grad():
        total, count = loss(ids, labels, positions, segments)
    assert int(count) == m - 1
    return float(total)


@pytest.mark.parametrize("family", FAMILIES)
def test_five_qlora_steps(family: str, tmp_path: Path) -> None:
    folder, _ = train(recipe_of(family, make(family, tmp_path / family), tmp_path))
    metrics = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert len(metrics) == STEPS
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(torch.isfinite(torch.tensor(m["grad_norm"])) for m in metrics)
