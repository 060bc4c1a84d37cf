"""Adapters' dropout: masks that are nowhere stored, products and gradients, both ways on."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_ft.kernels import dropout
from raytune_ft.kernels.dropout import Mask, kept, project, project_backward
from tests.kernels.gradients import Tensor, relative_error

SEED = 0x299F31D0A4093822

SHAPES = [(5, 13, 1, 3), (130, 72, 3, 8), (70, 136, 2, 20), (33, 40, 5, 4), (66, 24, 2, 80)]
"""Rows, columns, adapters, rank: odd ones, more adapters and ranks than a launch takes."""


def _mask(p: float = 0.3, stream: int = 7, seed: int = SEED) -> Mask:
    return Mask(torch.tensor([seed]), stream, p)


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns, n, rank = shape
    random = torch.Generator().manual_seed(rows)
    sizes = (rows, columns), (n, rank, columns), (rows, n * rank), (rows, columns)
    x, a, gradient, before = (torch.randn(size, generator=random).to(dtype) for size in sizes)
    return x, a, gradient, before


def _exact(x: Tensor, a: Tensor, mask: Mask) -> Tensor:
    """The formula, in float64 and for autograd."""
    grown = LEVELS / (LEVELS - round(mask.p * LEVELS))
    masks = [kept(mask, index, *x.shape) for index in range(len(a))]
    return torch.cat([(x * m * grown) @ one.t() for m, one in zip(masks, a, strict=True)], dim=1)


LEVELS = 65536


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, (0xFFFFFFFF,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_numbers_are_philox(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Random123's own test vectors of philox4x32 with 7 rounds (kat_vectors)."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)

    found = dropout._philox(torch.tensor([key]), (c0, c1, c2, c3))

    assert tuple(map(int, found)) == words


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_masks_drop_what_they_should_independently(p: float) -> None:
    rows, columns = 200, 301
    n = rows * columns
    one, other_adapter = kept(_mask(p), 0, rows, columns), kept(_mask(p), 1, rows, columns)
    others = [
        other_adapter,
        kept(_mask(p, seed=SEED + 1), 0, rows, columns),
        one.roll(1, 0),
        one.roll(1, 1),
        one.roll(8, 1),
    ]

    five_sigma = 5 * math.sqrt(p * (1 - p) / n)
    assert abs(float((~one).float().mean()) - p) < five_sigma
    for other in others:
        both = float((~one & ~other).float().mean())
        assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n)


def test_a_mask_is_named_by_seed_and_stream() -> None:
    again = kept(_mask(stream=3), 4, 20, 40)
    assert torch.equal(again, kept(_mask(stream=7), 0, 20, 40))
    assert torch.equal(again[:9, :17], kept(_mask(stream=6), 1, 9, 17))


@pytest.mark.parametrize(
    ("dtype", "adds"), [(torch.float32, True), (torch.float16, True), (torch.float16, False)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients(
    shape: tuple[int, int, int, int], dtype: torch.dtype, adds: bool, way: str
) -> None:
    """Against autograd in float64; float16, because the interpreter multiplies no bfloat16.

    What is not added takes the place of whatever stands there, NaN too.
    """
    x, a, gradient, before = _case(shape, dtype)
    wide = [tensor.double().requires_grad_() for tensor in (x, a)]
    exact = _exact(*wide, _mask())
    exact.backward(gradient.double())
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]

    got = project(x, a, _mask())
    x_gradient = before.clone() if adds else torch.full_like(before, torch.nan)
    of_a = project_backward(x, a, gradient, _mask(), x_gradient, adds=adds)

    assert (got.dtype, of_a.dtype) == (dtype, torch.float32)
    assert relative_error(got, exact) < tolerance
    # products of float16 numbers are exact in float32, so only the sums round
    assert relative_error(of_a, wide[1].grad) < 2e-6
    right = wide[0].grad + before.double() if adds else wide[0].grad
    assert relative_error(x_gradient, right) < tolerance
    assert torch.equal(of_a, project_backward(x, a, gradient, _mask(), None))


@pytest.mark.parametrize("adds", [True, False])
def test_without_dropout_it_is_a_product(adds: bool) -> None:
    x, a, gradient, before = _case((9, 24, 2, 4), torch.float64)
    x_gradient = before.clone()

    of_a = project_backward(x, a, gradient, None, x_gradient, adds=adds)

    flat = a.flatten(0, 1)
    torch.testing.assert_close(project(x, a, None), x @ flat.t())
    torch.testing.assert_close(of_a.flatten(0, 1), gradient.t() @ x)
    torch.testing.assert_close(x_gradient, gradient @ flat + (before if adds else 0))


def test_no_rows(way: str) -> None:
    x, a, gradient, _ = _case((0, 24, 2, 4), torch.float32)
    assert project(x, a, _mask()).shape == (0, 8)
    assert not project_backward(x, a, gradient, _mask(), x.clone()).any()
