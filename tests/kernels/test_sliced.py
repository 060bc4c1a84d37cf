"""Trials side by side in a layer: each one's rows, masks and gradients are as in a layer alone."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.kernels.linear import Base, Lora, adapted
from raytune_ft.kernels.sliced import sliced

ROWS, WIDTH = 6, 16
TRIALS = ((4, 2.0, 0.25), (2, 0.5, 0.0), (8, 1.0, 0.5))
"""Rank, scale and dropout of each."""


def updates(seed: int, outs: tuple[int, ...]) -> list[list[Lora | None]]:
    torch.manual_seed(seed)
    return [
        [
            Lora(
                torch.randn(r, WIDTH, requires_grad=True),
                torch.randn(out, r, requires_grad=True),
                scale, p,
            )
            for out in outs
        ]
        for r, scale, p in TRIALS
    ]  # fmt: skip


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_each_trial_is_as_if_alone(*, has_bias: bool, is_adapted: bool) -> None:
    """To the rounding of float32: the base multiplies all rows at once."""
    outs = (8, 12)
    torch.manual_seed(1)
    bases = [Base(torch.nn.Linear(WIDTH, out, bias=has_bias).requires_grad_(False)) for out in outs]
    x = torch.randn(len(TRIALS), ROWS, WIDTH)
    seed = torch.tensor([1234])
    loras: list[list[Lora | None]] = [[None] * len(outs)] * len(TRIALS)
    if is_adapted:
        loras = updates(2, outs)
    weights = [torch.randn(len(TRIALS), ROWS, out) for out in outs]

    together = x.clone().requires_grad_()
    found = sliced(together, bases, loras, seed, 5)
    sum((y * w).sum() for y, w in zip(found, weights, strict=True)).backward()  # type: ignore[union-attr]
    gradients = [(lora.a.grad, lora.b.grad) for trial in loras for lora in trial if lora]
    for lora in (lora for trial in loras for lora in trial if lora):
        lora.a.grad = lora.b.grad = None

    for number, trial in enumerate(loras):
        alone = x[number].clone().requires_grad_()
        expected = adapted(alone, list(zip(bases, trial, strict=True)), seed, 5)
        sum((y * w[number]).sum() for y, w in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[number], theirs, rtol=1e-5, atol=1e-5)
        assert together.grad is not None
        torch.testing.assert_close(together.grad[number], alone.grad, rtol=1e-5, atol=1e-5)
    again = [(lora.a.grad, lora.b.grad) for trial in loras for lora in trial if lora]
    for pair, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(pair, other, rtol=1e-5, atol=1e-5)
