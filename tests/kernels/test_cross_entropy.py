"""Cross entropy that leaves its gradient in the logits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raytune_ft.kernels.cross_entropy import capped, losses_and_gradient, write_hidden_gradient
from raytune_ft.model.loss import head_losses
from tests.kernels.gradients import Tensor, assert_near, root_mean_square

pytestmark = pytest.mark.usefixtures("way")
WORDS = 5003
"""More than a block of the program, and no multiple of anything."""


def _exact(logits: Tensor, targets: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    losses = nn.functional.cross_entropy(capped(wide, cap), targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def _case(
    rows: int, words: int, scale: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows)
    logits = (scale * torch.randn(rows, words, generator=random)).to(dtype)
    targets = torch.randint(0, words, (rows,), generator=random)
    targets[:2] = torch.tensor([0, words - 1])[:rows]
    return logits, targets


@pytest.mark.parametrize(
    ("rows", "words", "scale"), [(3, WORDS, 1.0), (2, WORDS, 3000.0), (1, 2, 1.0), (5, 4096, 5.0)]
)
def test_losses_and_gradient_in_place(rows: int, words: int, scale: float) -> None:
    logits, targets = _case(rows, words, scale)
    exact = _exact(logits, targets)

    losses = losses_and_gradient(logits, targets)

    assert losses.dtype == torch.float32
    # the logarithm of the sum is a float32 as large as the logits
    assert_near([losses, logits], exact, 1e-6 * max(1.0, scale / 10))


@pytest.mark.parametrize(("words", "scale"), [(WORDS, 1.0), (WORDS, 40.0), (2, 500.0)])
def test_capped_logits(words: int, scale: float) -> None:
    """Whatever a row holds, its loss is below twice the cap and the logarithm of the words."""
    logits, targets = _case(3, words, scale)
    exact = _exact(logits, targets, 30.0)

    losses = losses_and_gradient(logits, targets, 30.0)

    assert_near([losses, logits], exact, 2e-6)
    assert losses.max() < 60 + 9


def test_bfloat16_logits_are_reckoned_in_float32() -> None:
    logits, targets = _case(4, WORDS, 4.0, torch.bfloat16)
    losses, gradient = _exact(logits, targets)

    got = losses_and_gradient(logits, targets)

    assert_near([got], [losses], 1e-6)
    assert_near([logits], [gradient], 2**-7)
    # each row pulls as much up as down
    assert logits.double().sum(1).abs().max() < 0.02


def test_rows_of_a_wider_buffer_and_no_rows_at_all() -> None:
    buffer = torch.full((3, 50), 7.0)
    logits, targets = _case(3, 40, 1.0)
    buffer[:, :40] = logits

    losses = losses_and_gradient(buffer[:, :40], targets)

    assert_near([losses, buffer[:, :40]], _exact(logits, targets), 1e-6)
    assert (buffer[:, 40:] == 7).all()
    assert losses_and_gradient(buffer[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_head_gives_the_gradient_of_hidden_states(
    bias: bool, fused: bool, cap: float | None
) -> None:
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 77, bias=bias).requires_grad_(False)
    hidden = torch.randn(9, 16, generator=random)
    targets = torch.randint(0, 77, (9,), generator=random)
    factors = torch.rand(9, generator=random)

    mine, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    losses = head_losses(head, mine, targets, fused=fused, cap=cap)
    (losses * factors).sum().backward()
    logits = capped(head.double()(exact), cap)
    right = nn.functional.cross_entropy(logits, targets, reduction="none")
    (right * factors.double()).sum().backward()

    assert mine.grad is not None and exact.grad is not None
    assert_near([losses, mine.grad], [right, exact.grad], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_of_hidden_states_is_rounded_once(dtype: torch.dtype) -> None:
    """A target's -1 makes one part of the sum as large as the whole: parts must not be rounded."""
    logits, targets = _case(70, WORDS, 0.6, dtype)
    losses_and_gradient(logits, targets)
    weight = (torch.rand(WORDS, 16, generator=torch.Generator().manual_seed(1)) - 0.5).to(dtype)
    exact, out = logits.double() @ weight.double(), torch.empty(70, 16, dtype=dtype)

    write_hidden_gradient(logits, weight, out)

    once = root_mean_square(exact.to(dtype), exact)
    assert root_mean_square(out, exact) <= (1.05 if dtype is torch.bfloat16 else 20) * once
    parts = [part.to(dtype).double() for part in _products(logits, weight, 4)]
    twice = root_mean_square(torch.stack(parts).sum(0).to(dtype), exact)
    # what this test is about: with bfloat16 parts the error is that of two roundings
    assert dtype is torch.float32 or 1.25 * once < twice


def _products(gradient: Tensor, weight: Tensor, parts: int) -> list[Tensor]:
    pairs = zip(gradient.chunk(parts, 1), weight.chunk(parts), strict=True)
    return [left.double() @ right.double() for left, right in pairs]
