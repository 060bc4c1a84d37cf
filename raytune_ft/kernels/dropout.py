"""LoRA's dropout: x in, `dropout_i(x) A_i^T` of several adapters out, and the way back.

A mask is no tensor: each bit comes from a counter and is computed again where it is needed, so
nothing is stored, and forward, backward and a recomputed forward see the same mask. Each adapter
has its own mask, as in PEFT.

Where bits come from: Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", table 2: the fewest that pass BigCrush). Key: the seed. Counter: (column / 8, row,
stream, 0). One call gives 8 numbers of 16 bits, low halves first, for 8 neighbouring columns.
Probabilities are rounded to 1/65536, and what is kept is divided by the rounded one, so that the
mean is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_ft.kernels.launch import accumulator, ceil_div, has_triton

ROUNDS = 7
SPAN = 8
"""Neighbouring columns that one call serves."""
LEVELS = 1 << 16
"""Probabilities are multiples of 1 / LEVELS."""

HOST_PART = 1 << 15
"""Calls that a host computes at once."""

_WORD = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)


@dataclass(frozen=True)
class Mask:
    """Names the masks of adapters that share an input; adapter i has stream `stream + i`."""

    seed: Tensor
    """(1,) int64, on the input's device: read by kernels, never by the host."""
    stream: int
    """Tells masks of one seed apart; 0 or more, below 2^31."""
    p: float
    """Probability in [0, 1) with which an element is dropped."""

    @property
    def threshold(self) -> int:
        """16-bit numbers below it drop their element."""
        return round(self.p * LEVELS)

    @property
    def growth(self) -> float:
        """What kept elements are multiplied by, 1 / (1 - p)."""
        return LEVELS / (LEVELS - self.threshold)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed (1,) from torch's own generator of that device, without waiting for it."""
    return torch.randint(0, 1 << 62, (1,), device=device)


def kept(mask: Mask, index: int, rows: int, columns: int) -> Tensor:
    """Return the mask of adapter `index` as a tensor: (rows, columns) bool, true where kept."""
    groups = ceil_div(columns, SPAN)
    out = torch.empty(rows, groups, SPAN, dtype=torch.bool, device=mask.seed.device)
    # on a host, parts that stay in the cache and below what torch cuts into threads
    step = max(1, rows if mask.seed.is_cuda else HOST_PART // groups)
    column = torch.arange(groups, device=out.device)
    stream, zero = torch.full_like(column[:1], mask.stream + index), torch.zeros_like(column[:1])
    for start in range(0, rows, step):
        part = out[start : start + step]
        row = torch.arange(start, start + len(part), device=out.device).unsqueeze(1)
        words = _philox(mask.seed, (column, row, stream, zero))
        for place, word in enumerate(words):
            torch.ge(word & (LEVELS - 1), mask.threshold, out=part[:, :, 2 * place])
            torch.ge(word >> 16, mask.threshold, out=part[:, :, 2 * place + 1])
    return out.flatten(1)[:, :columns]


def project(x: Tensor, a: Tensor, mask: Mask | None) -> Tensor:
    """Return what the adapters make of their input: (rows, adapters * rank), of x's dtype.

    Args:
        x: (rows, in).
        a: (adapters, rank, in), of x's dtype.
        mask: of the dropout in front of them; None: there is none.
    """
    if mask is None:
        return x @ a.flatten(0, 1).t()
    if _by_triton(x):
        from raytune_ft.kernels import dropout_triton

        return dropout_triton.project(x, a, mask)
    return project_reference(x, a, mask)


def project_backward(
    x: Tensor,
    a: Tensor,
    gradient: Tensor,
    mask: Mask | None,
    x_gradient: Tensor | None,
    *,
    adds: bool = True,
) -> Tensor:
    """Return the gradient of `a`, (adapters, rank, in), and write that of x in place.

    Args:
        x: as `project` got it, (rows, in).
        a: the same, (adapters, rank, in).
        gradient: of what it returned, (rows, adapters * rank).
        mask: the same.
        x_gradient: (rows, in), for the gradient of x; None if nobody asks.
        adds: it is added to what stands there; else it takes its place, whatever that is.

    The gradient of `a` is float32 where x is half precision: sums over rows are long.
    """
    if mask is None:
        flat = a.flatten(0, 1)
        if x_gradient is not None and adds:
            x_gradient.addmm_(gradient, flat)
        elif x_gradient is not None:
            torch.mm(gradient, flat, out=x_gradient)
        return product(gradient.t(), x).view_as(a)
    if _by_triton(x):
        from raytune_ft.kernels import dropout_triton

        return dropout_triton.project_backward(x, a, gradient, mask, x_gradient, adds=adds)
    return project_backward_reference(x, a, gradient, mask, x_gradient, adds=adds)


def project_reference(x: Tensor, a: Tensor, mask: Mask) -> Tensor:
    """As `project` with a mask, by plain torch."""
    parts = [_dropped(x, mask, index) @ a[index].t() for index in range(len(a))]
    return torch.cat(parts, dim=1) * mask.growth


def project_backward_reference(
    x: Tensor,
    a: Tensor,
    gradient: Tensor,
    mask: Mask,
    x_gradient: Tensor | None,
    *,
    adds: bool = True,
) -> Tensor:
    """As `project_backward` with a mask, by plain torch."""
    if x_gradient is not None and not adds:
        x_gradient.zero_()
    gradients = []
    for index, part in enumerate(gradient.chunk(len(a), dim=1)):
        mine = kept(mask, index, *x.shape)
        gradients.append(product(part.t(), x * mine) * mask.growth)
        if x_gradient is not None:
            x_gradient += (part @ a[index]) * mine * mask.growth
    return torch.stack(gradients)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix product, in float32 where the factors are half precision."""
    dtype = accumulator(left.dtype)
    if left.is_cuda and dtype != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _by_triton(x: Tensor) -> bool:
    return has_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def _dropped(x: Tensor, mask: Mask, index: int) -> Tensor:
    return x * kept(mask, index, *x.shape)


def _philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Return four words of 32 bits, held in int64, for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # a product of two words fills 64 bits: it wraps in int64, its bits are right all the same
        left, right = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c2 = ((right >> 32) & _WORD) ^ c1 ^ k0, ((left >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = right & _WORD, left & _WORD
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    return [c0, c1, c2, c3]
