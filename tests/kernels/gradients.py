"""Outputs and gradients of a function on tensors, and how far others are from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
Function = Callable[..., Any]


def outputs_and_gradients(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return what `function` gives of copies of `inputs`, and the gradient of each of them.

    The gradients of the outputs are the same whatever the type, `dtype` or the inputs' own.
    """
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    random = torch.Generator().manual_seed(len(outputs))
    # drawn by shape, not by memory, and of numbers that every type holds
    pulls = [torch.randint(-8, 9, y.shape, generator=random) / 8 for y in outputs]
    pulls = [pull.to(y.device, y.dtype) for pull, y in zip(pulls, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, pulls)
    return [*(y.detach() for y in outputs), *gradients]


def assert_near(
    got: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float, what: str = ""
) -> None:
    """Hold tensors against float64 ones; `tolerance` is relative to each one's largest number."""
    assert len(got) == len(exact)
    for number, (here, there) in enumerate(zip(got, exact, strict=True)):
        error = relative_error(here, there)
        assert error <= tolerance, f"{what} tensor {number}: {error:.2e} > {tolerance:.2e}"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest difference, as a part of the largest number."""
    assert got.shape == exact.shape
    if not exact.numel():
        return 0.0
    wide, right = got.detach().double(), exact.detach().double()
    return float((wide - right).abs().max() / right.abs().max().clamp_min(1e-30))


def root_mean_square(got: Tensor, exact: Tensor) -> float:
    """Return the root of the mean squared difference."""
    return float((got.double() - exact.double()).square().mean().sqrt())
