"""Losses by parts of the head: hidden states and a head's weight, part by part, in, losses out.

The head may lie elsewhere and come in parts of its words, each once: logits of a part exist for a
moment, and sums go on from part to part, rescaled as the highest logit grows (online softmax,
Milakov and Gimelshein 2018). The gradient needs no second look: d loss / d hidden is the mean of
all words' rows, weighted by their probabilities, less the target's row.

Numbers: logits in the hidden states' type, as they are where the head is whole; sums in float32.

Shapes: T = labelled tokens, H = hidden width, V = words, v = words of a part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from raytune_ft.kernels.launch import accumulator

ROWS = 1024
"""Tokens that meet a part at a time."""

Part = tuple[int, Tensor]
"""Number of the first word, and the rows (v, H) from there on."""


class Sums:
    """What is known of tokens' losses after some parts."""

    def __init__(self, hidden: Tensor, targets: Tensor, *, differentiate: bool) -> None:
        """Begin: hidden (T, H), targets (T,) int64."""
        self.hidden, self.targets = hidden, targets
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.highest = hidden.new_full((len(hidden),), -torch.inf, dtype=self.wide)
        self.total = torch.zeros_like(self.highest)
        self.wanted = torch.zeros_like(self.highest)
        self.differentiate = differentiate
        asked = hidden if differentiate else hidden[:0]
        self.mean = torch.zeros_like(asked, dtype=self.wide)
        self.own = torch.zeros_like(asked)

    def add(self, start: int, part: Tensor, bias: Tensor | None) -> None:
        """Take the words from `start` on: their rows (v, H), and their biases (v,)."""
        for first in range(0, len(self.hidden), ROWS):
            self._add(slice(first, first + ROWS), start, part, bias)

    def _add(self, rows: slice, start: int, part: Tensor, bias: Tensor | None) -> None:
        hidden = self.hidden[rows]
        logits = (hidden @ part.T if bias is None else torch.addmm(bias, hidden, part.T)).to(
            self.wide
        )
        index = self.targets[rows] - start
        inside = (index >= 0) & (index < len(part))
        index = index.clamp(0, len(part) - 1)
        of_target = logits.gather(1, index.unsqueeze(1)).squeeze(1)
        self.wanted[rows] = torch.where(inside, of_target, self.wanted[rows])
        before = self.highest[rows]
        highest = torch.maximum(before, logits.amax(1))
        shrink = (before - highest).exp()
        weights = logits.sub_(highest.unsqueeze(1)).exp_()
        self.highest[rows] = highest
        self.total[rows] = self.total[rows] * shrink + weights.sum(1)
        if not self.differentiate:
            return
        mean, own = self.mean[rows], self.own[rows]
        mean.mul_(shrink.unsqueeze(1)).add_(_product(weights.to(part.dtype), part))
        torch.where(inside.unsqueeze(1), part[index], own, out=own)

    def losses(self) -> Tensor:
        """Return the losses (T,), behind the last part."""
        return self.highest + self.total.log() - self.wanted

    def gradient(self) -> Tensor:
        """Return each loss's gradient by its own row of hidden states: (T, H)."""
        return self.mean.div_(self.total.unsqueeze(1)).sub_(self.own).to(self.hidden.dtype)


def losses_and_gradient(
    hidden: Tensor,
    targets: Tensor,
    parts: Iterable[Part],
    bias: Tensor | None = None,
    *,
    differentiate: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the cross entropies (T,) of a head in parts, and each one's gradient (T, H).

    Args:
        hidden: (T, H).
        targets: (T,), int64, each in 0..V-1.
        parts: of the head's weight, together all words once, in any order.
        bias: (V,), on the device of `hidden`.
        differentiate: whether the gradient is wanted; else None is returned in its place.

    Returns:
        Losses in float32, in float64 for float64 hidden states; the gradient in their own type.
    """
    with torch.no_grad():
        sums = Sums(hidden, targets, differentiate=differentiate)
        for start, part in parts:
            of_part = None if bias is None else bias[start : start + len(part)]
            sums.add(start, part, of_part)
        return sums.losses(), sums.gradient() if differentiate else None


def _product(weights: Tensor, part: Tensor) -> Tensor:
    """Return `weights @ part` in the type in which products are summed."""
    wide = accumulator(part.dtype)
    if part.is_cuda and wide != part.dtype:
        return torch.mm(weights, part, out_dtype=wide)
    return (weights @ part).to(wide)
