"""Products in float8: what is packed, in which scales, and how far results may be off."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from raytune_ft.errors import ModelError
from raytune_ft.kernels.fp8 import E4M3, LARGEST, Fp8Weight, eighth, filled_up, quantize_rows
from raytune_ft.kernels.linear import Base, Lora, adapted
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize_reference
from tests.kernels.gradients import Tensor, outputs_and_gradients, root_mean_square

HALF_PLACE = 2**-4
"""Of e4m3's three bits; numbers below its smallest normal one have fewer."""
TINY = 2**-6 / 8

OF_PRODUCTS = 0.05
"""Root of mean squares: two factors, each off by up to 6% and by 2.6% in the mean."""


def _off(got: Tensor, exact: Tensor) -> float:
    return root_mean_square(got, exact) / float(exact.square().mean().sqrt())


def _assert_rounded(values: Tensor, exact: Tensor, way: str) -> None:
    error, room = (values.float() - exact).abs(), exact.abs() * HALF_PLACE + TINY / 2
    if way == "triton":
        # the interpreter loses the carry where a number rounds up to a power of two, and cuts off
        # the smallest ones, as no GPU does (tests/gpu)
        assert (error <= exact.abs() / 2 + TINY).all()
        assert (error <= room).float().mean() > 0.9
    else:
        assert (error <= room).all()


@pytest.mark.parametrize("shape", [(5, 16), (3, 300)])
@pytest.mark.parametrize("with_factors", [False, True])
def test_rows_have_scales_of_their_own(
    shape: tuple[int, int], with_factors: bool, way: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-20, 15, shape[0]).unsqueeze(1)
    x[1] = 0
    factors = torch.rand(shape[1]) * 9 if with_factors else None

    got = quantize_rows(x, factors)

    whole = x if factors is None else x * factors
    assert (got.values.dtype, got.scales.shape) == (E4M3, (shape[0], 1))
    assert not got.values[1].float().any()
    torch.testing.assert_close(got.scales[2:] * LARGEST, whole[2:].abs().amax(1, keepdim=True))
    _assert_rounded(got.values, whole / got.scales, way)
    assert (got.values.float().abs().amax(1)[2:] >= LARGEST * 0.92).all()


@pytest.mark.parametrize("size", [1e-28, 1e-13, 1e30])
def test_rows_of_any_size_keep_their_places(size: float, way: str) -> None:
    """Gradients are small: of a mean over all tokens of a step, and times a weight's scale."""
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2)) * size
    got = quantize_rows(x)
    torch.testing.assert_close(
        got.scales * LARGEST, x.abs().amax(1, keepdim=True), rtol=1e-5, atol=0
    )
    _assert_rounded(got.values, x / got.scales, way)


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights_become_rows_of_e4m3(transposed: bool, way: str) -> None:
    layer = _nf4(48, 80)
    matrix = dequantize_reference(Nf4Weight.of(layer))
    scales = matrix.abs().amax(1) / LARGEST

    got = eighth(Nf4Weight.of(layer), scales, transposed=transposed)

    assert got.is_contiguous()
    _assert_rounded(got.t() if transposed else got, matrix / scales.unsqueeze(1), way)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_plain_weights_become_rows_of_e4m3(transposed: bool, turned: bool, way: str) -> None:
    matrix = torch.randn(48, 80, generator=torch.Generator().manual_seed(4))
    source = matrix.t().contiguous().t() if turned else matrix
    scales = matrix.abs().amax(1) / LARGEST

    got = eighth(source.to(torch.bfloat16), scales, transposed=transposed)

    exact = matrix.to(torch.bfloat16) / scales.unsqueeze(1)
    assert got.is_contiguous()
    _assert_rounded(got.t() if transposed else got, exact, way)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the interpreter, whose rounding is worse."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("packed", [False, True])
def test_a_weight_times_and_back(packed: bool) -> None:
    layer = _nf4(48, 80) if packed else nn.Linear(80, 48, bias=False)
    base = Base(layer)
    matrix = base.matrix(torch.float32).clone()
    source = Nf4Weight.of(layer) if packed else matrix
    weight = Fp8Weight.of(source, matrix)
    x, gradient = torch.randn(30, 80), torch.randn(30, 48) * torch.rand(30, 1)

    forward = weight.times(quantize_rows(x), torch.full((48,), 0.1), torch.float32)
    back = weight.back(gradient)

    assert _off(forward, x @ matrix.t() + 0.1) < OF_PRODUCTS
    assert _off(back, gradient @ matrix) < OF_PRODUCTS


def _roundings(exact: Tensor, scales: Tensor) -> Tensor:
    """Return how far e4m3 may be from numbers in a scale: half a place, or half of the smallest."""
    return exact.abs() * (HALF_PLACE + 2**-20) + scales * TINY / 2


def _room(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor) -> Tensor:
    """Return how far `x w^T` may be off where each factor is rounded and sums are float32's."""
    of_x, of_w = _roundings(x, x_scales), _roundings(w, w_scales)
    sums = x.abs() @ w.abs().t()
    return of_x @ w.abs().t() + x.abs() @ of_w.t() + of_x @ of_w.t() + 2**-20 * sums


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "out", "width"), [(1, 16, 16), (33, 48, 112), (7, 208, 64)])
def test_every_number_is_within_what_e4m3_rounds(
    tokens: int, out: int, width: int, packed: bool, kept: bool
) -> None:
    """Float64 beside it: rows of many sizes, numbers that e4m3 has no normal form of, a zero row.

    No bound is measured: half a place of three bits for each factor, and nothing else.
    """
    torch.manual_seed(tokens)
    layer = _nf4(out, width) if packed else nn.Linear(width, out, bias=False)
    base = Base(layer.requires_grad_(False))
    base.in_fp8(resident=kept)
    weight = base.eighths
    assert weight is not None and bool(weight.kept) is kept
    w = base.matrix(torch.float32).double()
    spread = torch.logspace(-4, 3, tokens).unsqueeze(1) * torch.randn(tokens, 1).exp()
    x = torch.randn(tokens, width) * spread * torch.logspace(-6, 0, width)
    g = torch.randn(tokens, out) * spread.flip(0) * torch.logspace(0, -6, out)
    x[-1] = 0

    forward = weight.times(quantize_rows(x), None, torch.float32).double()
    back = weight.back(g).double()

    s = weight.scales.double()
    exact = x.double()
    room = _room(exact, w, exact.abs().amax(1, keepdim=True) / LARGEST, s.unsqueeze(1))
    assert ((forward - exact @ w.t()).abs() <= room).all()
    scaled, values = g.double() * s, w / s.unsqueeze(1)
    room = _room(scaled, values.t(), scaled.abs().amax(1, keepdim=True) / LARGEST, s.new_ones(1, 1))
    assert ((back - g.double() @ w).abs() <= room).all()
    assert tokens == 1 or not forward[-1].any()


@pytest.mark.usefixtures("plain")
def test_what_is_kept_gives_the_same_bits_and_can_go_again() -> None:
    base = Base(_nf4(48, 80))
    x, found = torch.randn(5, 80), []
    for resident in (False, True):
        base.in_fp8(resident=resident)
        assert base.eighths is not None
        rows = quantize_rows(x)
        forward = base.eighths.times(rows, None, torch.float32)
        found.append((forward, base.eighths.back(forward)))
    assert all(map(torch.equal, *found))
    base.streamed()
    assert base.eighths is not None and not base.eighths.kept


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("bias", [False, True])
def test_groups_in_fp8_differ_by_their_frozen_products_alone(bias: bool) -> None:
    torch.manual_seed(1)
    bases = [Base(nn.Linear(48, out, bias=bias).requires_grad_(False)) for out in (32, 16)]
    unrounded = [Base(base.module) for base in bases]
    for base in bases:
        base.in_fp8()
    leaves = [torch.randn(2, 20, 48)] + [
        torch.randn(size) / 7 for size in ((4, 48), (4, 48), (32, 4), (16, 4))
    ]

    def run(these: list[Base], x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        loras = [Lora(a, b, 0.5, 0.0) for a, b in zip(w[:2], w[2:], strict=True)]
        return tuple(adapted(x, list(zip(these, loras, strict=True))))

    got = outputs_and_gradients(lambda *given: run(bases, *given), leaves)
    right = outputs_and_gradients(lambda *given: run(unrounded, *given), leaves)

    assert all(0 < _off(a, b) < OF_PRODUCTS for a, b in zip(got[:3], right[:3], strict=True))
    for mine, other in zip(got[3:], right[3:], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("tokens", [1, 511, 512, 513])
def test_few_rows_are_filled_up_with_zeros(tokens: int) -> None:
    rows = quantize_rows(torch.randn(tokens, 48))
    found = filled_up(rows)
    assert len(found.values) == len(found.scales) == max(tokens, 512)
    assert torch.equal(found.values[:tokens].float(), rows.values.float())
    assert torch.equal(found.scales[:tokens], rows.scales)
    assert not found.values[tokens:].float().any() and (found.scales[tokens:] == 1).all()


def test_odd_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 16"):
        Base(nn.Linear(40, 16)).in_fp8()


def _nf4(out: int, width: int) -> Linear4bit:
    torch.manual_seed(out)
    return Linear4bit(width, out, bias=False, quant_type="nf4").to("cpu")
