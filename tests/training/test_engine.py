"""Engines against each other, against one rank, and against themselves after a reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytune_ft.config.schema import LoraSection, ModelSection, Recipe
from raytune_ft.errors import CheckpointError
from raytune_ft.model import adapter, loading
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training import presets
from raytune_ft.training.batching import TensorBatch, empty_batch
from raytune_ft.training.engine import Engine, State, TorchEngine, ZeroEngine

CPU = torch.device("cpu")
STEPS = 3


def recipe(folder: Path, accumulation: int, zero: str) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(folder)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {
            "micro_batch_size": 1, "accumulation": accumulation, "lr": 1e-2, "max_norm": 0.05,
            "weight_decay": 0.01, "deepspeed": zero,
        },
    })  # fmt: skip


def build(folder: Path, accumulation: int, zero: str) -> Engine:
    """A LoRA engine on the tiny model; its B matrices are not zero, so every gradient counts."""
    chosen = recipe(folder, accumulation, zero)
    model = loading.load_model(folder, ModelSection(path=str(folder)), CPU)
    model = adapter.attach(model, LoraSection(r=4, alpha=8, dropout=0.0), 1)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    config = presets.resolve(chosen, torch.float32, on_gpu=False)
    if config is None:
        return TorchEngine(TokenLoss(model), CPU, chosen.train)
    return ZeroEngine(TokenLoss(model), CPU, chosen.train, config)


def batches() -> list[list[TensorBatch]]:
    """Four ragged micro-batches for each step; one has no label at all."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
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
    return sum(int((b["labels"][:, 1:] != -100).sum()) for b in step)


def advance(engine: Engine, step: list[TensorBatch], rank: int = 0, world: int = 1) -> float:
    for batch in step[rank::world]:
        engine.forward_backward(batch, targets(step))
    return engine.step(1e-2)


def close(one: State, other: State, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def after_all_steps(engine: Engine) -> tuple[State, list[float]]:
    norms = [advance(engine, step) for step in batches()]
    return engine.weights(), norms


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> tuple[State, list[float]]:
    return after_all_steps(build(tiny_model, 4, "none"))


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_zero_equals_plain_torch(
    tiny_model: Path, plain: tuple[State, list[float]], zero: str
) -> None:
    """float32: only the order of additions may differ."""
    weights, norms = after_all_steps(build(tiny_model, 4, zero))
    close(weights, plain[0], 5e-6)  # Adam divides by what may be near 0
    assert norms == pytest.approx(plain[1], rel=1e-5)
    assert max(norms) > 0.05, "clipping must have been at work"


@pytest.mark.parametrize("zero", ["none", "zero1", "zero2", "zero3", "zero3_offload"])
def test_reload_goes_on_bit_for_bit(tiny_model: Path, zero: str) -> None:
    engine = build(tiny_model, 4, zero)
    steps = batches()
    for step in steps[:2]:
        advance(engine, step)
    weights, state = engine.weights(), engine.optimizer_state()
    advance(engine, steps[2])

    other = build(tiny_model, 4, zero)
    other.load(weights, state)
    assert all(torch.equal(v, state[k]) for k, v in other.optimizer_state().items())
    advance(other, steps[2])
    for name, value in engine.weights().items():
        assert torch.equal(value, other.weights()[name]), name


@pytest.mark.parametrize("pair", [("none", "zero3"), ("zero3", "zero2"), ("zero1", "none")])
def test_state_moves_between_engines(tiny_model: Path, pair: tuple[str, str]) -> None:
    one, other = (build(tiny_model, 4, zero) for zero in pair)
    steps = batches()
    advance(one, steps[0])
    other.load(one.weights(), one.optimizer_state())
    advance(one, steps[1])
    advance(other, steps[1])
    close(one.weights(), other.weights(), 1e-6)


def test_a_checkpoint_of_another_shape_is_refused(tiny_model: Path) -> None:
    engine = build(tiny_model, 4, "none")
    weights = engine.weights()
    first = sorted(weights)[0]
    with pytest.raises(CheckpointError, match="1 trained tensors"):
        engine.load({**weights, first: torch.zeros(1)}, {})


def two_ranks(rank: int, folder: Path, out: Path, zero: str) -> None:
    """Entry of one of two gloo processes: half of each step's micro-batches."""
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store_{zero}", rank=rank, world_size=2
    )
    engine = build(folder, 2, zero)
    norms = [advance(engine, step, rank, 2) for step in batches()]
    state, weights = engine.optimizer_state(), engine.weights()
    if rank == 0:
        torch.save({"weights": weights, "state": state, "norms": norms}, out / f"{zero}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_two_ranks_equal_one(
    tiny_model: Path, tmp_path: Path, plain: tuple[State, list[float]], zero: str
) -> None:
    entry: Callable[..., None] = two_ranks
    mp.spawn(entry, args=(tiny_model, tmp_path, zero), nprocs=2)
    got = torch.load(tmp_path / f"{zero}.pt", weights_only=True)
    close(got["weights"], plain[0], 1e-6)
    assert got["norms"] == pytest.approx(plain[1], rel=1e-5)

    one_rank = build(tiny_model, 4, "none")
    one_rank.load(got["weights"], got["state"])  # a checkpoint of two ranks fits one
    close(one_rank.optimizer_state(), got["state"], 0)
