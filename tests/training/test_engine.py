"""Engines against each other, against one rank, and against themselves after a reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raytune_ft.errors import CheckpointError
from raytune_ft.training.engine import Engine, State
from tests.ranks import run_ranks
from tests.training.engines import advance, after_all_steps, build, close
from tests.training.ragged import batches

SPREAD = ("none", "zero2", "zero3")


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> tuple[State, list[float]]:
    return after_all_steps(build(tiny_model, 4, "none"))


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero2_offload", "zero3_offload"])
def test_zero_equals_plain_torch(
    tiny_model: Path, plain: tuple[State, list[float]], zero: str
) -> None:
    """float32: only the order of additions may differ."""
    weights, norms = after_all_steps(build(tiny_model, 4, zero))
    close(weights, plain[0], 5e-6)  # Adam divides by what may be near 0
    assert norms == pytest.approx(plain[1], rel=1e-5)
    assert max(norms) > 0.05, "clipping must have been at work"


@pytest.mark.parametrize("zero", ["none", "zero2", "zero3"])
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


@pytest.mark.parametrize("pair", [("none", "zero3"), ("zero1", "none")])
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


def two_ranks(rank: int, folder: Path, out: Path) -> None:
    """Entry of one of two gloo processes: half of each step's micro-batches, by every engine."""
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    first = torch.load(out / "first.pt", weights_only=True)
    for zero in SPREAD:
        engine = build(folder, 2, zero)
        engine.load(first["weights"], first["state"])  # of one rank, after one step
        norms = [advance(engine, step, rank, 2) for step in batches()[1:]]
        with engine.whole():
            loss = first_loss(engine) if rank == 0 else 0.0  # one rank alone
        state, weights = engine.optimizer_state(), engine.weights()
        advance(engine, batches()[0], rank, 2)
        engine.load(first["weights"], first["state"])  # as the best weights are, behind the last
        with engine.whole():
            back = first_loss(engine)
        if rank == 0:
            found = {"weights": weights, "state": state, "norms": norms, "loss": loss, "back": back}
            torch.save(found, out / f"{zero}.pt")
        else:
            assert not state and not weights
    dist.destroy_process_group()


def first_loss(engine: Engine) -> float:
    with torch.no_grad():
        return float(engine.module(**batches()[0][0])[0])


@pytest.mark.slow
def test_two_ranks_go_on_where_one_was(
    tiny_model: Path, tmp_path: Path, plain: tuple[State, list[float]]
) -> None:
    one = build(tiny_model, 4, "none")
    advance(one, batches()[0])
    torch.save({"weights": one.weights(), "state": one.optimizer_state()}, tmp_path / "first.pt")
    begun = first_loss(one)
    entry: Callable[..., None] = two_ranks
    run_ranks(entry, (tiny_model, tmp_path), 2)
    for zero in SPREAD:
        got = torch.load(tmp_path / f"{zero}.pt", weights_only=True)
        close(got["weights"], plain[0], 5e-6)
        assert got["norms"] == pytest.approx(plain[1][1:], rel=1e-5)
        alone = build(tiny_model, 4, "zero1")
        alone.load(got["weights"], got["state"])  # a checkpoint of two ranks fits one
        close(alone.optimizer_state(), got["state"], 0)
        assert got["loss"] == pytest.approx(first_loss(alone), rel=1e-6)
        assert got["back"] == pytest.approx(begun, rel=1e-6) != got["loss"]
