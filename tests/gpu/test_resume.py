"""A run that goes on from a checkpoint takes the steps that it would have taken, on a GPU too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine
from tests.gpu.test_zero import ON_CPU, ON_GPU, advance, batches, build

STEPS = 3
ZEROS = ("none", "zero1", "zero2", "zero2_offload", "zero3")
WAYS = [
    *(
        pytest.param("cuda", *way, marks=ON_GPU)
        for way in itertools.product(ZEROS, ("adamw", "paged_adamw_32bit", "lion"))
        if way != ("zero2_offload", "lion")  # refused: the host steps no lion
    ),
    pytest.param("cpu", "none", "lion", marks=ON_CPU),
    pytest.param("cpu", "zero2", "adamw", marks=ON_CPU),
]


def losses(engine: Engine, steps: Iterable[list[TensorBatch]]) -> list[float]:
    return [advance(engine, step)[0] for step in steps]


@pytest.mark.parametrize(("device", "zero", "optimizer"), WAYS)
def test_the_next_steps_are_those_of_the_run_that_went_on(
    device: str, zero: str, optimizer: str
) -> None:
    steps = list(itertools.islice(batches(device), 2 * STEPS))
    first = build(zero, "bfloat16", "lora", device, optimizer)
    losses(first, steps[:STEPS])
    weights, state = first.weights(), first.optimizer_state()
    assert all(tensor.device.type == "cpu" for tensor in [*weights.values(), *state.values()])
    expected = losses(first, steps[STEPS:])
    second = build(zero, "bfloat16", "lora", device, optimizer)
    second.load(weights, state)
    assert losses(second, steps[STEPS:]) == pytest.approx(expected, rel=1e-3)
