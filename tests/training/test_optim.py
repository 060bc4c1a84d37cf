"""Optimizers: against their formulas written again, and taken up again to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe, TrainSection
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from raytune_ft.training.optim import MuonAdamW, build_optimizer, set_lr
from tests.training.ragged import batches, targets

CPU = torch.device("cpu")
LR, DECAY, BETAS = 3e-2, 0.1, (0.9, 0.99)
Step = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def section(optimizer: str) -> TrainSection:
    return TrainSection.model_validate(
        {"optimizer": optimizer, "lr": LR, "weight_decay": DECAY, "betas": BETAS}
    )


def adamw(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Loshchilov and Hutter 2019, algorithm 2."""
    m = v = torch.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        right = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
        weight = weight - LR * DECAY * weight - LR * right
    return weight


def lion(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Chen et al. 2023, algorithm 2."""
    m = torch.zeros_like(weight)
    for g in gradients:
        sign = (BETAS[0] * m + (1 - BETAS[0]) * g).sign()
        weight = weight * (1 - LR * DECAY) - LR * sign
        m = BETAS[1] * m + (1 - BETAS[1]) * g
    return weight


def muon(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Jordan 2024, with the step's size of arXiv 2502.16982; Nesterov's momentum of 0.95."""
    m = torch.zeros_like(weight)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m + 0.05 * g
        size = 0.2 * max(weight.shape) ** 0.5
        weight = weight * (1 - LR * DECAY) - LR * size * newton_schulz(ahead)
    return weight


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of X <- a X + (b XX' + c (XX')^2) X from X of norm 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


EXACT = 2e-6
HALF = 2e-2
"""torch's Muon multiplies in bfloat16, whose last bit is 4e-3 of a number."""


@pytest.mark.parametrize(
    ("name", "formula", "tolerance"),
    [
        ("adamw", adamw, EXACT),
        ("paged_adamw_32bit", adamw, EXACT),
        ("lion", lion, EXACT),
        ("muon", muon, HALF),
    ],
)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_few_steps_are_the_formula_s(
    name: str, formula: Step, tolerance: float, shape: tuple[int, int]
) -> None:
    random = torch.Generator().manual_seed(4)
    start = torch.randn(shape, generator=random, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(4)]
    weight = torch.nn.Parameter(start.float())
    optimizer = build_optimizer({"layer.weight": weight}, section(name))
    for gradient in gradients:
        weight.grad = gradient.float()
        set_lr(optimizer, LR)
        optimizer.step()
    moved = (weight.detach().double() - start).norm()
    wrong = (weight.detach().double() - formula(start, gradients)).norm()
    assert moved > 0.1
    assert wrong / moved < tolerance


def test_muon_leaves_vectors_and_tables_to_adamw() -> None:
    shapes = {"a.weight": (8, 6), "a.bias": (8,), "embed_tokens.weight": (9, 6)}
    trained = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer(trained, section("muon"))
    assert isinstance(optimizer, MuonAdamW)
    for parameter in trained.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    set_lr(optimizer, LR)
    optimizer.step()
    kept = {name: set(optimizer.state[parameter]) for name, parameter in trained.items()}
    assert kept["a.weight"] == {"momentum_buffer"}
    assert kept["a.bias"] == kept["embed_tokens.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    gradients = [torch.full((8,), 0.5, dtype=torch.float64)]
    expected = adamw(torch.ones(8, dtype=torch.float64), gradients)
    torch.testing.assert_close(trained["a.bias"].detach().double(), expected)


def recipe(folder: Path, optimizer: str, zero: str, **lora: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(folder), "method": "lora" if lora else "full"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, **lora},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {
            "micro_batch_size": 1, "accumulation": 4, "lr": 1e-2, "weight_decay": 0.01,
            "optimizer": optimizer, "deepspeed": zero,
        },
    })  # fmt: skip


def advance(engine: Engine, number: int, lr: float = 1e-2) -> None:
    step = batches()[number % 3]
    for batch in step:
        engine.forward_backward(batch, targets(step))
    engine.step(lr / (1 + number))


ALLOWED = [
    (optimizer, zero)
    for optimizer in
    ("adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "lion", "muon")
    for zero in ("none", "zero2")
    if zero == "none" or not (optimizer.endswith("8bit") or optimizer == "muon")
] + [("adamw", "zero1"), ("lion", "zero3")]  # fmt: skip


IN_EVERY_RUN = [("adamw", "none"), ("adamw_8bit", "none"), ("adamw", "zero2"), ("muon", "none")]


@pytest.mark.parametrize(
    ("optimizer", "zero"),
    [
        pytest.param(*pair, marks=() if pair in IN_EVERY_RUN else pytest.mark.exact)
        for pair in ALLOWED
    ],
)
def test_six_steps_are_three_and_three(tiny_model: Path, optimizer: str, zero: str) -> None:
    """Through what a checkpoint holds: weights and state by parameter."""
    chosen = recipe(tiny_model, optimizer, zero)
    whole, _ = build_engine(chosen, tiny_model, CPU)
    for number in range(6):
        advance(whole, number)
        if number == 2:
            weights, state = whole.weights(), whole.optimizer_state()
    again, _ = build_engine(chosen, tiny_model, CPU)
    again.load(weights, state)
    for number in range(3, 6):
        advance(again, number)
    for found, expected in (
        (again.weights(), whole.weights()),
        (again.optimizer_state(), whole.optimizer_state()),
    ):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    if optimizer.endswith("8bit"):
        assert any(name.endswith("/absmax1") for name in state)
        assert any(value.dtype == torch.uint8 for value in state.values())


@pytest.mark.parametrize(
    ("optimizer", "zero"), [("adamw", "none"), ("adamw", "zero2"), ("lion", "zero2")]
)
def test_b_matrices_learn_at_their_own_rate(tiny_model: Path, optimizer: str, zero: str) -> None:
    """LoRA+: a first step of either optimizer is as long as its learning rate says."""
    moved: dict[float, dict[str, torch.Tensor]] = {}
    for ratio in (1.0, 8.0):
        chosen = recipe(tiny_model, optimizer, zero, loraplus_lr_ratio=ratio)
        engine, _ = build_engine(chosen, tiny_model, CPU)
        before = engine.weights()
        advance(engine, 0, lr=1e-3)
        moved[ratio] = {name: now - before[name] for name, now in engine.weights().items()}
    for name, plain in moved[1.0].items():
        scale = 8.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(moved[8.0][name], plain * scale, rtol=1e-3, atol=1e-6)
    assert sum("lora_B" in name for name in moved[1.0]) == 14
