"""Passes of fixed shapes: the numbers of passes of any shape, and nothing asked of the device.

On a CPU nothing is captured; all else is as on a GPU. `tests/gpu/test_micro_graph.py` captures.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_ft.config.estimates.pace import GRAPHED_BELOW
from raytune_ft.model.loss import bounds_of
from raytune_ft.training.batching import empty_batch
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.guarding.stragglers import ForwardClock
from raytune_ft.training.micro_shapes import FEWEST_SEGMENTS, Shape
from raytune_ft.training.step import seed_step
from tests.training.engines import close
from tests.training.micro import CPU, LENGTH, Side, batches, recipe_of, side

WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select")
DRAWS = ("randint", "rand", "bernoulli_", "native_dropout", "uniform_", "normal_", "random_")
WAYS: list[dict[str, Any]] = [
    {},
    {"train.deepspeed": "zero2", "model.dtype": "bfloat16"},
    {"model.gradient_checkpointing": True},
    {"lora.dropout": 0.0},
]


class Seen(TorchDispatchMode):
    """Note the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def passes(one: Side, number: int = 0) -> list[torch.Tensor]:
    """Run a step's passes, as `step` seeds them; return their losses."""
    step, n_targets = batches()[number]
    seed_step(7, number + 1)
    return [one.engine.forward_backward(batch, n_targets) for batch in step]


@pytest.mark.parametrize("changes", WAYS, ids=["plain", "zero2", "recomputed", "no dropout"])
def test_fixed_passes_have_the_numbers_of_others(tiny_model: Path, changes: dict[str, Any]) -> None:
    """Losses, gradients, weights after steps; masks too, since seeds come from the same state."""
    fixed, free = side(tiny_model, "fixed", **changes), side(tiny_model, None, **changes)
    tolerance = 2e-2 if "model.dtype" in changes else 2e-6
    for number in range(3):
        losses = passes(fixed, number), passes(free, number)
        torch.testing.assert_close(*losses, rtol=tolerance / 4, atol=tolerance)
        for name, gradient in fixed.gradients().items():
            expected = free.gradients()[name]
            assert gradient.dtype == torch.float32
            largest = expected.abs().max()
            torch.testing.assert_close(gradient, expected, rtol=0, atol=float(largest) * tolerance)
        norms = [one.engine.step(1e-3) for one in (fixed, free)]
        assert norms[0] == pytest.approx(norms[1], rel=tolerance)
        assert not any(place.any() for place in fixed.engine.places().values())
    assert fixed.micro is not None and not fixed.said
    assert fixed.micro.seen_safe and not fixed.micro.refused


@pytest.mark.parametrize("changes", WAYS, ids=["plain", "zero2", "recomputed", "no dropout"])
def test_a_pass_asks_the_device_for_nothing(tiny_model: Path, changes: dict[str, Any]) -> None:
    """And draws nothing: what a graph reads is written before."""
    one = side(tiny_model, "fixed", **changes)
    passes(one)
    assert one.micro is not None
    held = next(iter(one.micro._passes.values()))
    with Seen() as seen:
        held.work()
    assert seen.names["add_"] >= len(one.engine.trained)
    assert not [name for name in (*WAITS, *DRAWS) if seen.names[name]]


@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_nothing_ties_gradients_to_the_stream_that_an_engine_is_built_in(
    tiny_model: Path, zero: str
) -> None:
    """A capture has a stream of its own; autograd adds gradients in that of a node it finds."""
    one = side(tiny_model, "fixed", **{"model.dtype": "bfloat16", "train.deepspeed": zero})
    for _ in range(2):
        for name, weight in one.engine.trained.items():
            seen = get_gradient_edge(weight).node.metadata
            assert "seen" not in seen, f"the node that adds {name}'s gradients lives on"
            seen["seen"] = True
            del seen
        step, n_targets = batches()[0]
        one.engine.forward_backward(step[0], n_targets)


def test_masks_differ_from_pass_to_pass_and_come_again(tiny_model: Path) -> None:
    one = side(tiny_model, "fixed")
    (first, *_), n_targets = batches()[0]

    def losses(seed: int) -> list[float]:
        seed_step(seed, 1)
        return [float(one.engine.forward_backward(first, n_targets)) for _ in range(2)]

    found = losses(7)
    assert found[0] != found[1]
    assert losses(8) != found
    assert losses(7) == found


@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_a_run_with_fixed_passes_goes_on_to_the_bit(tiny_model: Path, zero: str) -> None:
    """The first pass behind a restart is watched; the same one of a whole run is not."""
    dtype = "float32" if zero == "none" else "bfloat16"
    changes = {"train.deepspeed": zero, "model.dtype": dtype}
    whole = side(tiny_model, "fixed", **changes)
    passes(whole, 0), whole.engine.step(1e-3)
    weights, state = whole.engine.weights(), whole.engine.optimizer_state()
    losses = passes(whole, 1)
    whole.engine.step(1e-3)
    again = side(tiny_model, "fixed", **changes)
    again.engine.load(weights, state)
    assert passes(again, 1) == losses
    again.engine.step(1e-3)
    close(again.engine.weights(), whole.engine.weights(), 0)
    close(again.engine.optimizer_state(), whole.engine.optimizer_state(), 0)


def test_what_draws_goes_on_without_and_says_why(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA keeps PEFT's way, with PEFT's dropout; its run has the numbers of one without a try."""
    tried, plain = (side(tiny_model, way, **{"lora.use_dora": True}) for way in ("fixed", None))
    losses = passes(tried), passes(plain)
    assert losses[0] == losses[1]
    assert tried.micro is not None and tried.micro.refused
    (line,) = tried.said
    assert "draw" in line or "depends on values" in line
    close(tried.gradients(), plain.gradients(), 0)
    passes(tried, 1)
    assert len(tried.said) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train.objective": "dpo"}, "train.objective: dpo"),
        ({"train.neftune_noise_alpha": 5.0}, "neftune"),
        ({"data.pack": "none"}, "data.pack: none"),
        ({"model.fast_path": False}, "fast path"),
        ({"train.deepspeed": "zero3"}, "ZeRO-3"),
        ({"train.deepspeed": "zero2", "train.accumulation": 1}, "DeepSpeed sums"),
    ],
)
def test_what_cannot_have_fixed_shapes_says_so(
    tiny_model: Path, changes: dict[str, Any], why: str
) -> None:
    one = side(tiny_model, "fixed", **changes)
    assert one.micro is None and one.engine.micro is None
    (line,) = one.said
    assert line.startswith("passes are not replayed from a CUDA graph") and why in line


def test_on_a_cpu_nothing_is_tried_and_nothing_said(tiny_model: Path) -> None:
    one = side(tiny_model, "auto")
    assert one.micro is None and one.said == []


def test_gradients_that_are_dropped_leave_their_places(tiny_model: Path) -> None:
    """A step that did not fit is taken again, in another layout: graphs go, places stay."""
    one = side(tiny_model, "fixed")
    places = one.engine.places()
    expected = passes(one)
    wanted = one.gradients()
    Room.of(one.recipe).put(one.engine)
    one.engine.drop_gradients()  # type: ignore[attr-defined]
    assert one.micro is not None and not one.micro._passes
    assert not any(place.any() for place in places.values())
    assert passes(one) == expected
    close(one.gradients(), wanted, 0)
    for parameter in one.engine.trained.values():
        parameter.grad = None  # as `optimizer.zero_grad` does
    assert passes(one) == expected
    close(one.gradients(), wanted, 0)
    assert all(one.engine.places()[name] is place for name, place in places.items())


@pytest.mark.parametrize("step", batches())
def test_a_row_of_numbers_holds_its_batch(step: Any) -> None:
    for batch in [*step[0], empty_batch()]:
        shape = Shape.holding(batch, LENGTH)
        assert shape is not None
        parts = shape.parts(shape.row(batch))
        own, count = batch["input_ids"].shape[1], int(parts.count)
        assert torch.equal(parts.input_ids[:, :own], batch["input_ids"])
        assert not parts.input_ids[:, own:].any()
        assert torch.equal(parts.places[:count], batch["places"])  # of one row: no shift
        assert torch.equal(parts.targets[:count], batch["labels"].flatten()[batch["places"] + 1])
        assert len(parts.places.unique()) == shape.places >= count
        bounds = bounds_of(
            torch.nn.functional.pad(batch["segment_ids"], (0, LENGTH - own), value=-1)
        )
        assert torch.equal(parts.cu_seqlens[: len(bounds)], bounds)
        assert (parts.cu_seqlens[len(bounds) :] == LENGTH).all()
        assert len(parts.cu_seqlens) in (2, FEWEST_SEGMENTS + 1, 2 * FEWEST_SEGMENTS + 1)


def test_rows_side_by_side_keep_their_places() -> None:
    """Two packs of 20 and 48 tokens in rows of 64: places are those of the wider rows."""
    (made, _), (other, _) = batches([[(20,)], [(48,)]])
    width = 48
    batch = {
        key: torch.cat([torch.nn.functional.pad(one[key], (0, width - one[key].shape[1]),
                                                value=-100 if key == "labels" else fill)
                        for one in (made[0], other[0])])
        for key, fill in
        (("input_ids", 0), ("labels", -100), ("position_ids", 0), ("segment_ids", -1))
    }  # fmt: skip
    batch["places"] = torch.cat([made[0]["places"], other[0]["places"] + width])
    batch["cu_seqlens"] = bounds_of(batch["segment_ids"])
    shape = Shape.holding(batch, 64)
    assert shape is not None and (shape.rows, shape.segments) == (2, FEWEST_SEGMENTS)
    parts = shape.parts(shape.row(batch))
    first, second = made[0]["places"], other[0]["places"] + 64
    assert torch.equal(parts.places[: int(parts.count)], torch.cat([first, second]))
    assert parts.cu_seqlens[:5].tolist() == [0, 20, 64, 112, 128]
    assert Shape.holding(batch, 40) is None


def test_fixed_passes_are_timed_for_who_is_slow(tiny_model: Path) -> None:
    """They run no hook of the module, which times other passes."""
    one = side(tiny_model, "fixed")
    clock = one.engine.timed_by(ForwardClock(one.engine.module, CPU))
    passes(one)
    fixed = len(clock._spans)
    assert clock.take() > 0
    one.engine.micro = None
    passes(one)
    assert fixed == len(clock._spans) == len(batches()[0][0])


def test_what_is_worth_a_graph(tiny_model: Path) -> None:
    """Passes of many tokens keep the device busy without."""
    recipe = recipe_of(tiny_model, **{"data.max_length": GRAPHED_BELOW})
    batch = batches([[(48,)]])[0][0][0]
    one = side(tiny_model, "fixed", **{"data.max_length": recipe.data.max_length})
    assert one.micro is not None
    assert one.micro.take(batch, 1.0) is None
