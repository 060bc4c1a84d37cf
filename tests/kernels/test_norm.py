"""RMSNorm, with and without the residual sum, against float64 and transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raytune_ft.kernels.layer_norm import add_layer_norm
from raytune_ft.kernels.norm import add_rms_norm, rms_norm
from tests.kernels.gradients import (
    Tensor,
    assert_near,
    outputs_and_gradients,
    relative_error,
)

EPS = 1e-5
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}
PLACE = {"plain": 0.0, "triton": 2**-6}
"""Of bfloat16, two last places: the interpreter cuts numbers off where a GPU rounds (tests/gpu)."""
pytestmark = pytest.mark.usefixtures("way")


def _exact(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)


def _numbers(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=random).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 37), (1, 1, 64), (67, 100)])
def test_norm_and_its_gradients(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    x, _, weight = _numbers(*shape, dtype=dtype)

    got = outputs_and_gradients(lambda x, w: rms_norm(x, w, EPS, offset=offset), [x, weight])
    exact = outputs_and_gradients(lambda x, w: _exact(x, w, offset), [x, weight], torch.float64)

    assert [y.dtype for y in got] == [dtype] * 3
    assert_near(got, exact, TOLERANCES[dtype])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sum_and_norm_and_their_gradients(offset: float) -> None:
    x, residual, weight = _numbers(3, 2, 37)

    got = outputs_and_gradients(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, offset=offset), [x, residual, weight]
    )
    exact = outputs_and_gradients(
        lambda x, r, w: (_exact(x + r, w, offset), x + r), [x, residual, weight], torch.float64
    )

    assert_near(got, exact, TOLERANCES[torch.float32])


def test_sum_is_rounded_before_the_norm_reads_it(way: str) -> None:
    x, residual, weight = _numbers(5, 40, dtype=torch.bfloat16)

    normed, total = add_rms_norm(x, residual, weight, EPS)

    assert relative_error(total, x + residual) <= PLACE[way]
    assert torch.equal(normed, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_both_results_may_go_unused(used: int) -> None:
    x, residual, weight = _numbers(4, 37)

    def one(x: Tensor, residual: Tensor) -> Tensor:
        return add_rms_norm(x, residual, weight, EPS)[used]

    def exact_one(x: Tensor, residual: Tensor) -> Tensor:
        total = x + residual
        return (_exact(total, weight.double(), 0.0), total)[used]

    got = outputs_and_gradients(one, [x, residual])
    assert_near(got, outputs_and_gradients(exact_one, [x, residual], torch.float64), 2e-6)


def test_frozen_weight_gets_no_gradient_and_rows_may_lie_apart() -> None:
    wide, _, _ = _numbers(3, 2, 80)
    weight = torch.nn.Parameter(torch.ones(40), requires_grad=False)
    x = wide[..., :40].requires_grad_()

    rms_norm(x, weight, EPS).sum().backward()

    assert weight.grad is None
    exact = outputs_and_gradients(lambda x: _exact(x, 1.0, 0.0).sum(-1), [x], torch.float64)
    assert x.grad is not None and relative_error(rms_norm(x, weight, EPS).sum(-1), exact[0]) < 1e-5


@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rounds_where_transformers_does(
    module: Callable[..., torch.nn.Module], weight_dtype: torch.dtype, way: str
) -> None:
    x, _, weight = _numbers(9, 48, dtype=torch.bfloat16)
    theirs = module(48, eps=EPS).to(weight_dtype)
    theirs.weight.data.copy_(weight)
    offset = 1.0 if module is Gemma2RMSNorm else 0.0

    got, expected = rms_norm(x, theirs.weight, EPS, offset=offset), theirs(x)

    assert got.dtype == expected.dtype
    assert relative_error(got, expected) <= PLACE[way]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 37), (67, 100)])
def test_layer_norm_of_a_sum_and_its_gradients(
    shape: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> None:
    """Far from 0, where a variance of mean squares would cancel; nothing of the rows' ends."""
    x, residual, weight = _numbers(*shape, dtype=dtype)
    inputs = [x + 3, residual, weight, *([weight.flip(0)] if biased else [])]

    def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, r, w, b, EPS)

    def exact(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x + r
        centred = total - total.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w
        return y if b is None else y + b, total

    got = outputs_and_gradients(ours, inputs)
    assert_near(got, outputs_and_gradients(exact, inputs, torch.float64), TOLERANCES[dtype] * 2)
