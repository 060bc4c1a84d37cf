"""Products in float8 as a GPU computes them, at shapes of a 7B; tests/gpu/test_fp8_install.py has
whole models.

    python -m pytest tests/gpu/test_kernels_fp8.py tests/gpu/test_fp8_install.py -s -q

prints rates, and what sums in the GPU's products add to the rounding of their factors. About two
minutes on an H100, most of it the compilation of kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from raytune_ft.kernels.fp8 import LARGEST, Fp8Weight, eighth, quantize_rows
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4096, 11008), (48, 80)])
@pytest.mark.parametrize("turned", [False, True])
def test_weights_that_are_not_packed(
    shape: tuple[int, int], transposed: bool, turned: bool
) -> None:
    matrix = _random(*shape)
    matrix = matrix.t().contiguous().t() if turned else matrix
    scales = matrix.abs().amax(1).float() / LARGEST
    got = eighth(matrix, scales, transposed=transposed)
    assert got.is_contiguous()
    _assert_rounded(got.t() if transposed else got, matrix.float() / scales.unsqueeze(1))


def test_what_is_kept_gives_the_same_bits() -> None:
    base = Base(_nf4(1024, 2048))
    x, found = _random(300, 2048), []
    for resident in (False, True):
        base.in_fp8(resident=resident)
        assert base.eighths is not None
        y = base.eighths.times(quantize_rows(x), None, BF16)
        found.append((y, base.eighths.back(y)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)])
def test_sums_add_nothing_to_the_rounding_of_factors(shape: tuple[int, int], tokens: int) -> None:
    """Products of what is rounded, beside the same in float32; prints rates of both ways to sum.

    Both factors are drawn from one seed: rows that meet themselves are sums of one sign, where
    sums that are cut off lose most. bfloat16 rounds results by half of the bound at most.
    """
    matrix = _random(*shape) * 0.02
    weight = Fp8Weight.of(matrix, matrix)
    weight.keep()
    x = quantize_rows(_random(tokens, shape[1]))
    w = weight.values(transposed=False)
    exact = (x.values.float() @ w.float().t()) * x.scales * weight.scales
    flop, row = 2 * tokens * matrix.numel(), {}
    for fast in (True, False):

        def run(fast: bool = fast) -> Tensor:
            return torch._scaled_mm(
                x.values, w.t(), x.scales, weight.scales.unsqueeze(0), out_dtype=BF16,
                use_fast_accum=fast,
            )  # fmt: skip

        row[fast] = _off(run(), exact), flop / _seconds(run) / 1e12
    plain = _random(tokens, shape[1])
    rate = flop / _seconds(lambda: plain @ matrix.t()) / 1e12
    off = _off(weight.times(x, None, BF16), exact)
    rows = {
        "x": _seconds(lambda: quantize_rows(plain)) * 1e6,
        "weight": _seconds(lambda: eighth(matrix, weight.scales, transposed=False)) * 1e6,
        "turned": _seconds(lambda: eighth(matrix, weight.scales, transposed=True)) * 1e6,
    }
    print(
        f"{shape} x {tokens}: off {row[True][0]:.2%} in fast sums, {row[False][0]:.2%} in others; "
        f"{row[True][1]:.0f} and {row[False][1]:.0f} TFLOP/s, bfloat16 {rate:.0f}; rounding "
        f"{', '.join(f'{name} {micros:.0f} us' for name, micros in rows.items())}"
    )
    assert off < 2**-8


def _seconds(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


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


@pytest.mark.parametrize("tokens", [1, 24, 127, 256, 300])
@pytest.mark.parametrize("shape", [(4096, 11008), (11008, 4096), (32, 48)])
def test_few_tokens(shape: tuple[int, int], tokens: int) -> None:
    matrix = _random(*shape) * 0.02
    weight = Fp8Weight.of(matrix, matrix)
    x, gradient = _random(tokens, shape[1]), _random(tokens, shape[0])
    forward = weight.times(quantize_rows(x), None, BF16)
    back = weight.back(gradient)
    assert (forward.shape, back.shape) == (gradient.shape, x.shape)
    assert _off(forward, x.float() @ matrix.float().t()) < OF_PRODUCTS
    assert _off(back, gradient.float() @ matrix.float()) < OF_PRODUCTS


def test_nothing_waits_for_the_device() -> None:
    bases = [Base(_nf4(out, 512)) for out in (256, 128)]
    for base in bases:
        base.in_fp8()
    x, pull = _random(100, 512).requires_grad_(), [_random(100, out) for out in (256, 128)]
    for mode in ("default", "error"):  # kernels are compiled in the first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = adapted(x, [(base, None) for base in bases])
            torch.autograd.grad(y, x, pull)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [False, True])
def test_a_graph_replays_it(resident: bool) -> None:
    base = Base(_nf4(256, 512))
    base.in_fp8(resident=resident)
    x, pull = _random(100, 512).requires_grad_(), _random(100, 256)

    def step() -> list[Tensor]:
        (y,) = adapted(x, [(base, None)])
        # a graph that lives on ties x's gradient to the stream that it was made in
        return [*torch.autograd.grad(y, x, pull), y.detach()]

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
