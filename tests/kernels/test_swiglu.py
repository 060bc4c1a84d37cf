"""The gate of an MLP against float64, and what it keeps for the way back."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from raytune_ft.kernels.swiglu import Activation, fused_swiglu, swiglu
from tests.kernels.gradients import Tensor, assert_near, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("way")
THEIRS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}


def _gate_up(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shape, generator=random).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(2, 3, 37), (2, 1029), (1, 1)])
def test_gate_and_gradients(
    shape: tuple[int, ...], activation: Activation, dtype: torch.dtype
) -> None:
    inputs = _gate_up(*shape, dtype=dtype)

    got = outputs_and_gradients(lambda g, u: swiglu(g, u, activation=activation), inputs)
    exact = outputs_and_gradients(
        lambda g, u: ACT2FN[THEIRS[activation]](g) * u, inputs, torch.float64
    )

    assert [y.dtype for y in got] == [dtype] * 3
    assert_near(got, exact, TOLERANCES[dtype])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_one_tensor_of_both(activation: Activation) -> None:
    both = torch.cat(_gate_up(3, 2, 21), -1)

    def exact_gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return ACT2FN[THEIRS[activation]](gate) * up

    got = outputs_and_gradients(lambda x: fused_swiglu(x, activation=activation), [both])
    assert_near(got, outputs_and_gradients(exact_gate, [both], torch.float64), 2e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's exponential
def test_gates_far_out_neither_overflow_nor_die() -> None:
    gate = torch.tensor([[-1e4, -80.0, 0.0, 80.0, 1e4]])
    up = torch.full_like(gate, 2.0)

    y, dgate, dup = outputs_and_gradients(swiglu, [gate, up])

    assert torch.isfinite(torch.stack((y, dgate, dup))).all()
    assert y[0, 3:].tolist() == [160.0, 2e4] and y[0, 0] == 0


def test_keeps_its_inputs_alone(interpreter: None) -> None:
    gate, up = (x.requires_grad_() for x in _gate_up(4, 33))
    kept: list[int] = []

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.data_ptr()) or x, lambda x: x
    ):
        swiglu(gate, up)

    assert kept == [gate.data_ptr(), up.data_ptr()]
