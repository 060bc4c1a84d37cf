"""Products in float8 as a GPU computes them, at shapes of a 7B."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from raytune_ft.kernels.fp8 import LARGEST, eighth, quantize_rows
from raytune_ft.kernels.linear import Base, Lora, adapted
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize
from tests.kernels.gradients import Tensor, outputs_and_gradients, root_mean_square

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with float8",
    ),
]
DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
OF_PRODUCTS = 0.05
"""Root of mean squares: two factors, each off by 2.6% in the mean."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=random, device=DEVICE).to(BF16)


def _nf4(out: int, width: int, *, bias: bool = False) -> Linear4bit:
    torch.manual_seed(out)
    layer = Linear4bit(width, out, bias=bias, quant_type="nf4", compute_dtype=BF16)
    return layer.to(BF16).to(DEVICE)


def _off(got: Tensor, exact: Tensor) -> float:
    return root_mean_square(got, exact) / float(exact.double().square().mean().sqrt())


def _assert_rounded(values: Tensor, exact: Tensor) -> None:
    """To the nearest number of three bits; of those halfway, to either."""
    room = exact.abs() * 2**-4 * 1.001 + 2**-10
    assert ((values.float() - exact).abs() <= room).all()
    assert (values.float() == exact.to(values.dtype).float()).float().mean() > 0.99


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(777, 4096), (2048, 11008), (3, 48)])
def test_rows(shape: tuple[int, int], factors: bool) -> None:
    x = _random(*shape)
    by = torch.rand(shape[1], device=DEVICE) if factors else None
    got = quantize_rows(x, by)
    whole = x.float() if by is None else x.float() * by
    torch.testing.assert_close(got.scales * LARGEST, whole.abs().amax(1, keepdim=True))
    _assert_rounded(got.values, whole / got.scales)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (48, 80)])
def test_weights(shape: tuple[int, int], transposed: bool) -> None:
    packed = Nf4Weight.of(_nf4(*shape))
    matrix = dequantize(packed).float()
    scales = matrix.abs().amax(1) / LARGEST
    got = eighth(packed, scales, transposed=transposed)
    exact = matrix / scales.unsqueeze(1)
    values = got.t() if transposed else got
    # the packed weight is rounded to bfloat16 here, and is not on its way to float8
    room = exact.abs() * (2**-4 + 2**-8) + 2**-9
    assert ((values.float() - exact).abs() <= room).all()
    assert _off(values.float(), exact) < 0.03


@pytest.mark.parametrize("tokens", [777, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_groups_differ_by_their_frozen_products_alone(bias: bool, tokens: int) -> None:
    layers = [_nf4(out, 4096, bias=bias) for out in (4096, 11008)]
    eight, plain = ([Base(layer) for layer in layers] for _ in range(2))
    for base in eight:
        base.in_fp8()
    a = [_random(64, 4096, seed=one).float() / 64 for one in (1, 2)]
    b = [_random(layer.out_features, 64, seed=3).float() for layer in layers]
    leaves = [_random(1, tokens, 4096), *a, *b]

    def run(bases: list[Base], x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        loras = [Lora(a, b, 0.01, 0.0) for a, b in zip(w[:2], w[2:], strict=True)]
        return tuple(adapted(x, list(zip(bases, loras, strict=True))))

    got = outputs_and_gradients(lambda *given: run(eight, *given), leaves)
    right = outputs_and_gradients(lambda *given: run(plain, *given), leaves)

    offs = [_off(mine, other) for mine, other in zip(got, right, strict=True)]
    assert all(0 < off < OF_PRODUCTS for off in offs[:3]), offs
    assert max(offs[3:]) < 1e-4, offs


def test_a_graph_replays_it() -> None:
    base = Base(_nf4(256, 512))
    base.in_fp8()
    x, pull = _random(100, 512).requires_grad_(), _random(100, 256)

    def step() -> list[Tensor]:
        (y,) = adapted(x, [(base, None)])
        return [y, *torch.autograd.grad(y, x, pull)]

    eager, side = step(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(map(torch.equal, found, eager))
