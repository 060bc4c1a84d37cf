"""Losses by parts of the head: those of the whole head, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from raytune_ft.kernels import parted_head
from raytune_ft.kernels.parted_head import Part, losses_and_gradient
from raytune_ft.model.loss import head_losses
from tests.kernels.gradients import assert_near, root_mean_square

WORDS, WIDTH = 1003, 40


def made(
    tokens: int, scale: float, dtype: torch.dtype, *, bias: bool
) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(tokens)
    head = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = (scale * torch.randn(tokens, WIDTH)).to(dtype)
    targets = torch.randint(0, WORDS, (tokens,))
    targets[:2] = torch.tensor([0, WORDS - 1])[:tokens]
    return hidden, targets, head


def parts_of(weight: Tensor, size: int) -> Iterator[Part]:
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size]


def exact(hidden: Tensor, targets: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    wide = hidden.double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(wide, head.weight.double(), bias)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "scale"), [(100, 1.0), (WORDS, 1.0), (1, 1.0), (334, 300.0)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_parts_add_up_to_the_whole(
    bias: bool, size: int, scale: float, dtype: torch.dtype, bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(parted_head, "ROWS", 3)
    hidden, targets, head = made(7, scale, dtype, bias=bias)

    found = losses_and_gradient(hidden, targets, parts_of(head.weight, size), head.bias)

    assert found[0].dtype is dtype and found[1] is not None
    assert_near([found[0], found[1]], exact(hidden, targets, head), bound * max(1.0, scale / 10))


def test_half_precision_is_as_near_as_the_whole_head_s() -> None:
    """Of both ways the error by float64 numbers of the same bfloat16 weights."""
    hidden, targets, head = made(64, 2.0, torch.bfloat16, bias=False)
    losses, gradient = exact(hidden, targets, head)
    asks = hidden.clone().requires_grad_()
    whole = head_losses(head, asks, targets, fused=True)
    of_whole = torch.autograd.grad(whole.sum(), asks)[0]

    found, of_parts = losses_and_gradient(hidden, targets, parts_of(head.weight, 100))

    assert of_parts is not None and of_parts.dtype is torch.bfloat16
    assert torch.allclose(found, whole.detach(), rtol=0, atol=2e-5)
    errors = [root_mean_square(one, gradient) for one in (of_parts, of_whole)]
    print(f"of parts {errors[0]:.2e}, of the whole {errors[1]:.2e}")
    assert errors[0] <= 1.1 * errors[1]
    assert root_mean_square(found, losses) <= 1.01 * root_mean_square(whole.detach(), losses)


def test_losses_alone_and_no_tokens() -> None:
    hidden, targets, head = made(5, 1.0, torch.float32, bias=True)
    losses, none = losses_and_gradient(
        hidden, targets, parts_of(head.weight, 64), head.bias, differentiate=False
    )
    assert none is None
    assert_near([losses], [exact(hidden, targets, head)[0]], 1e-6)
    empty = losses_and_gradient(hidden[:0], targets[:0], parts_of(head.weight, 64), head.bias)
    assert empty[0].shape == (0,) and empty[1] is not None and empty[1].shape == (0, WIDTH)
