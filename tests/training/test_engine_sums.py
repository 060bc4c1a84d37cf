"""Gradients summed once a step: DeepSpeed's own numbers, fewer operations, nothing sent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_ft.training.engine import Engine, ZeroEngine
from raytune_ft.training.engine.sums import BorderSums
from tests.training.engines import advance, build, close
from tests.training.ragged import batches, targets

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter_tensor",
    "broadcast",
)  # fmt: skip


class Counting(TorchDispatchMode):
    """Count operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def stage_2(tmp_path: Path) -> str:
    file = tmp_path / "stage_2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}))
    return str(file)


def micro_step(engine: Engine) -> Counter[str]:
    """Count the operations of a step's second micro-step, behind which gradients are summed."""
    step = batches()[0]
    engine.forward_backward(step[0], targets(step))
    with Counting() as counting:
        engine.forward_backward(step[1], targets(step))
    return counting.found


def by_deepspeed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Build an engine whose gradients DeepSpeed collects itself."""
    with monkeypatch.context() as patch:
        patch.setattr(BorderSums, "are_kept", staticmethod(lambda _: False))
        return build(folder, 4, "zero2", "bfloat16")


def test_sums_are_those_of_deepspeed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit; their norm, over which steps are clipped, is taken in one piece."""
    theirs, mine = by_deepspeed(tiny_model, monkeypatch), build(tiny_model, 4, "zero2", "bfloat16")
    assert isinstance(mine, ZeroEngine) and mine.sums is not None and mine.stage == 1
    assert isinstance(theirs, ZeroEngine)
    for step in batches():
        for batch in step:
            for engine in (mine, theirs):
                engine.forward_backward(batch, targets(step))
        (found,), (expected,) = (one.zero.fp32_groups_gradients_flat for one in (mine, theirs))
        assert found.any() and found.equal(expected)
        norms = mine.step(1e-2), theirs.step(1e-2)
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        close(mine.weights(), theirs.weights(), 1e-6)
        mine.load(theirs.weights(), theirs.optimizer_state())


def test_a_micro_step_costs_an_addition_for_each_weight(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = build(tiny_model, 4, "zero2", "bfloat16"), by_deepspeed(tiny_model, monkeypatch)
    n, found, before = len(mine.trained), micro_step(mine), micro_step(theirs)
    plain = micro_step(build(tiny_model, 4, "none", "bfloat16"))
    print(f"\n{n} weights: {found.total()} operations, by DeepSpeed {before.total()}, "
          f"plain torch {plain.total()}")  # fmt: skip
    assert found["aten::add_.Tensor"] == n
    # DeepSpeed zeroes, adds up in bfloat16 and widens as well
    assert before.total() - found.total() >= 2 * n
    assert all(parameter.grad is None for parameter in mine.trained.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_rank_sends_nothing_before_the_border(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """In bfloat16 not there either; in float32 DeepSpeed sends itself its sums and a norm, once."""
    engine = build(tiny_model, 4, "zero2", dtype)
    advance(engine, batches()[0])
    sent: list[int] = []
    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, told(getattr(dist, name), sent))
    step = batches()[1]
    for batch in step[:-1]:
        engine.forward_backward(batch, targets(step))
    assert not sent
    engine.forward_backward(step[-1], targets(step))
    engine.step(1e-2)
    gradients = sum(p.numel() for p in engine.trained.values())
    assert sum(sent) == (0 if dtype == "bfloat16" else gradients + 1)


def told(real: Any, sent: list[int]) -> Any:
    """Wrap a collective so that it notes how many numbers it is given."""

    def wrapped(tensor: Any, *args: Any, **more: Any) -> Any:
        sent.append((tensor[0] if isinstance(tensor, list) else tensor).numel())
        return real(tensor, *args, **more)

    return wrapped


def test_a_step_costs_few_operations_whatever_the_number_of_weights(tiny_model: Path) -> None:
    engine = build(tiny_model, 4, "zero2", "bfloat16")
    advance(engine, batches()[0])
    step = batches()[1]
    for batch in step:
        engine.forward_backward(batch, targets(step))
    with Counting() as counting:
        engine.step(1e-2)
    norms = sum(n for name, n in counting.found.items() if "norm" in name)
    print(f"\n{counting.found.total()} operations at the border")
    assert norms == 1
    assert counting.found["aten::mul_.Tensor"] < len(engine.trained)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_runs_of_stage_2_go_on(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    """Older runs of one rank have their state from DeepSpeed's stage 2."""
    older = build(tiny_model, 4, stage_2(tmp_path), dtype)
    advance(older, batches()[0])
    weights, state = older.weights(), older.optimizer_state()
    newer = build(tiny_model, 4, "zero2", dtype)
    newer.load(weights, state)
    close(newer.optimizer_state(), state, 0)
    assert isinstance(older, ZeroEngine) and isinstance(newer, ZeroEngine)
    assert (older.stage, newer.stage) == (2, 1)
    norms = advance(older, batches()[1]), advance(newer, batches()[1])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    close(newer.weights(), older.weights(), 5e-6)
