"""What `model.compute: fp8` rounds, told by other means than ours: a step of an installed model in,
the gradients that the same roundings give a plain float32 model of transformers and PEFT out.

Roundings are steps: where two ways differ by a bit of bfloat16 before one, a number in fifty goes
to the other side and is off by an eighth, so after a few layers two right ways have roundings of
their own and their gradients are as far from each other as from the own weights'. So the plain
model is given the installed one's: `listened` notes what each product got, and the plain model
adds to its own factors what rounding did to those. From there on everything is smooth, and what
differs is bfloat16, the order of sums, or a fault.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from raytune_ft.kernels import fp8, linear
from raytune_ft.kernels.fp8 import Fp8Weight, Rows
from raytune_ft.model.fastpath.linears import PART
from raytune_ft.model.loss import TokenLoss
from tests.kernels.gradients import root_mean_square
from tests.kernels.installed import Batch, Made

LARGEST = 448.0


def rounded(values: Tensor) -> Tensor:
    """Round to four bits, the first one among them, of at least 2**-6; in float64."""
    place = values.double().abs().clamp_min(2**-6).log2().floor() - 3
    return torch.round(values.double() / 2**place) * 2**place


def by_rows(x: Tensor) -> Tensor:
    """Round numbers, each row in a scale of its own; in float64."""
    scales = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return rounded(x.double() / scales) * scales


def nearest(given: Tensor, right: Tensor, taken: Tensor) -> Tensor:
    """Return what is rounded right; of two numbers that are as near, the one that was taken.

    Of numbers that are bfloat16's one in a thousand lies halfway, or a bit of float32 from it.
    """
    as_near = (taken - given).abs() <= (right - given).abs() + 1e-6 * given.abs()
    return torch.where(as_near, taken, right)


@dataclass(frozen=True)
class Weight:
    """A frozen weight in float8, (out, in) in float32."""

    values: Tensor
    """In e4m3's numbers."""
    scales: Tensor
    """(out, 1)."""

    @classmethod
    def of(cls, layer: Any, taken: Tensor) -> Weight:
        """Read a linear layer, packed by bitsandbytes or not; `taken` is what rounding made."""
        state, stored = getattr(layer.weight, "quant_state", None), layer.weight.detach()
        own = stored.float()
        if state is not None:
            wide = copy.copy(state)
            wide.dtype = torch.float32
            own = dequantize_4bit(stored, wide).float()
            # a row's scale is that of its numbers in the model's type
            stored = own.to(state.dtype)
        scales = stored.float().abs().amax(1, keepdim=True) / LARGEST
        given = own.double() / scales
        return cls(nearest(given, rounded(given), taken.double()).float(), scales)

    @property
    def matrix(self) -> Tensor:
        """What products in float8 multiply."""
        return self.values * self.scales


@dataclass
class Heard:
    """Of one layer's two products in one step: what rounding did, and how far results were off."""

    of_x: Tensor | None = None
    """(T, in): added to x."""
    of_gradient: Tensor | None = None
    """(T, out): added to the gradient times the weight's scales."""
    off: list[float] = field(default_factory=list)
    """Of results, beside exact sums of the same rounded factors; relative."""


class Listener:
    """What the float8 products of an installed model are given, layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        parts = {name: m.__dict__[PART] for name, m in model.named_modules() if PART in m.__dict__}
        bases = {name: part.base for name, part in parts.items() if part.base.eighths is not None}
        self.weights = {
            name: Weight.of(base.module, base.eighths.values(transposed=False))
            for name, base in bases.items()
        }
        self.heard = {name: Heard() for name in bases}
        self._names = {id(base.eighths): name for name, base in bases.items()}
        self._taken: list[tuple[Rows, Tensor]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to one step; what was heard before is forgotten."""
        self.heard.update({name: Heard() for name in self.heard})
        quantize, times, back = fp8.quantize_rows, Fp8Weight.times, Fp8Weight.back

        def quantized(x: Tensor, factors: Tensor | None = None) -> Rows:
            rows = quantize(x, factors)
            self._taken.append((rows, x.detach()))
            return rows

        def forward(weight: Fp8Weight, x: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
            out = times(weight, x, bias, dtype)
            self._hear_forward(weight, x, bias, out)
            return out

        def backward(weight: Fp8Weight, gradient: Tensor) -> Tensor:
            before = len(self._taken)
            out = back(weight, gradient)
            assert len(self._taken) == before + 1
            self._hear_backward(weight, gradient, out)
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fp8, "quantize_rows", quantized)
            patch.setattr(linear, "quantize_rows", quantized)
            patch.setattr(Fp8Weight, "times", forward)
            patch.setattr(Fp8Weight, "back", backward)
            yield
        self._taken.clear()

    def _hear_forward(self, of: Fp8Weight, x: Rows, bias: Tensor | None, out: Tensor) -> None:
        name = self._names[id(of)]
        given = next(given for rows, given in self._taken if rows is x).double()
        right, heard = nearest(given, by_rows(given), _wide(x)), self.heard[name]
        heard.of_x = (right - given).float()
        exact = right.float() @ self.weights[name].matrix.t()
        heard.off.append(_off(out, exact if bias is None else exact + bias.float()))

    def _hear_backward(self, of: Fp8Weight, gradient: Tensor, out: Tensor) -> None:
        name = self._names[id(of)]
        weight, heard = self.weights[name], self.heard[name]
        given = gradient.double() * weight.scales.t()
        right = nearest(given, by_rows(given), _wide(self._taken.pop()[0]))
        heard.of_gradient = (right - given).float()
        heard.off.append(_off(out, right.float() @ weight.values))


def _wide(rows: Rows) -> Tensor:
    return rows.values.double() * rows.scales


def _off(got: Tensor, exact: Tensor) -> float:
    return root_mean_square(got, exact) / float(exact.double().square().mean().sqrt())


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, heard: Heard) -> Tensor:
        ctx.weight, ctx.heard = weight, heard
        assert heard.of_x is not None
        return (x + heard.of_x.view_as(x)) @ weight.matrix.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, heard = ctx.weight, ctx.heard
        assert heard.of_gradient is not None
        scaled = gradients[0] * weight.scales.t()
        return (scaled + heard.of_gradient.view_as(scaled)) @ weight.values, None, None


def replay(plain: nn.Module, listener: Listener, installed: nn.Module) -> None:
    """Give a plain float32 model the weights of an installed one, and the roundings it hears."""
    stored = dict(installed.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if stored[name].shape == parameter.shape:
                parameter.copy_(stored[name])
    for name, layer in plain.named_modules():
        if name in listener.weights:
            _replace_product(layer.base_layer, name, listener)


def _replace_product(base: Any, name: str, listener: Listener) -> None:
    def forward(x: Tensor) -> Tensor:
        out = _Replayed.apply(x, listener.weights[name], listener.heard[name])  # type: ignore[no-untyped-call]
        return out if base.bias is None else out + base.bias  # type: ignore[no-any-return]

    base.forward = forward


@dataclass
class Followed:
    """What steps of an installed model and of its replay came to."""

    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of the first step."""
    off: dict[str, float] = field(default_factory=dict)
    """Layer -> its worst product of all steps."""

    def cosines(self) -> dict[str, float]:
        """Return each trained weight's cosine between the two gradients."""
        return cosines(*self.gradients)


def follow(
    installed: Made, plain: nn.Module, given: Sequence[Batch], *, steps: int, lr: float
) -> Followed:
    """Take steps of AdamW both ways from the installed adapter, each with an optimizer of its own.

    Args:
        installed: without dropout, which the plain way draws other numbers for.
        plain: the same structure in float32, with an adapter, not installed.
        given: a step's rows, over and over.
        steps: how many.
        lr: constant.
    """
    listener = Listener(installed[0])
    replay(plain, listener, installed[0])
    ways = (installed[:2], (plain.train(), TokenLoss(plain)))
    found, optimizers = Followed(), [_adamw(model, lr) for model, _ in ways]
    for step in range(steps):
        batch = given[step % len(given)]
        with listener.listening():
            found.losses[0].append(_backward(batch, installed[1]))
        found.losses[1].append(_backward(batch, ways[1][1]))
        for name, heard in listener.heard.items():
            found.off[name] = max(*heard.off, found.off.get(name, 0.0))
        if step == 0:
            found.gradients += [_gradients(model) for model, _ in ways]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found


def _adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def _backward(batch: Batch, loss: TokenLoss) -> float:
    total = batch.loss(loss)
    total.backward()  # type: ignore[no-untyped-call]
    return total.item()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def cosines(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the cosine between gradients of the same name, in float64."""
    assert found.keys() == expected.keys()
    return {name: _cosine(value, expected[name]) for name, value in found.items()}


def _cosine(one: Tensor, two: Tensor) -> float:
    flat = one.flatten().double(), two.flatten().double()
    return float(nn.functional.cosine_similarity(*flat, dim=0))
