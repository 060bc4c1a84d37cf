"""An output head on the host: it comes part by part, each part once a pass; 0.8 GiB of a 7B less.

The first parts set out when a pass begins and arrive while the layers compute; the others follow
as parts are done with. Losses and their gradient are summed up over parts (`kernels.parted_head`).
Answers get their logits the same way, at the speed of the bus.

Shapes: T = rows, H = hidden width, V = words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.config.estimates.setting import PART_WORDS, PARTS_AHEAD
from raytune_ft.kernels.parted_head import Part, losses_and_gradient
from raytune_ft.kernels.transfer import Arrival, begin
from raytune_ft.model.host_table import HostTable

COMING = "host_parts"
"""Attribute: the parts of the head that are on their way."""


class Parts:
    """One journey of a table (V, H) to a device."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        """Send the first parts off; they take `PARTS_AHEAD * PART_WORDS` rows of memory."""
        self._table = table
        self._starts = range(0, len(table), PART_WORDS)
        self._rooms = [
            torch.empty((min(PART_WORDS, len(table)), table.shape[1]), dtype=table.dtype,
                        device=device)
            for _ in range(min(PARTS_AHEAD, len(self._starts)))
        ]  # fmt: skip
        self._coming = [self._send(number) for number in range(len(self._rooms))]

    def __iter__(self) -> Iterator[Part]:
        """Yield each part when it is there; it lasts until the next one is asked for."""
        for number, start in enumerate(self._starts):
            part, arrival = self._coming[number % len(self._rooms)]
            arrival.wait()
            yield start, part
            behind = number + len(self._rooms)
            if behind < len(self._starts):
                self._coming[number % len(self._rooms)] = self._send(behind)

    def wait(self) -> None:
        """Let the device wait for all that is on its way: before its memory serves others."""
        for _, arrival in self._coming:
            arrival.wait()

    def _send(self, number: int) -> tuple[Tensor, Arrival]:
        start = self._starts[number]
        rows = self._table[start : start + PART_WORDS]
        room = self._rooms[number % len(self._rooms)][: len(rows)]
        return room, begin(room, rows)


class HostHead(HostTable):
    """Form of an output head: a matrix, with a bias or without."""

    def ahead(self: Any, device: torch.device) -> None:
        """Send the first parts off, for `losses` at the end of the pass that begins."""
        coming: Parts | None = self.__dict__.get(COMING)
        if coming is not None:  # of a pass that ended before its losses
            coming.wait()
        self.__dict__[COMING] = Parts(self.weight, device)

    def parts(self: Any, device: torch.device) -> Parts:
        """Return the parts that are on their way, or send them off."""
        coming: Parts | None = self.__dict__.pop(COMING, None)
        return Parts(self.weight, device) if coming is None else coming

    def losses(self: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropies (T,) of hidden states (T, H) against targets (T,)."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _Losses.apply(hidden, targets, self)  # type: ignore[no-any-return, no-untyped-call]
        parts = self.parts(hidden.device)
        return losses_and_gradient(hidden, targets, parts, self.bias, differentiate=False)[0]

    def forward(self: Any, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., H), for answers: no gradient."""
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        logits = rows.new_empty(len(rows), len(self.weight))
        for start, part in Parts(self.weight, hidden.device):
            bias = None if self.bias is None else self.bias[start : start + len(part)]
            logits[:, start : start + len(part)] = nn.functional.linear(rows, part, bias)
        return logits.view(*hidden.shape[:-1], -1)


class _Losses(torch.autograd.Function):
    """Losses with their gradients made on the way: each depends on its own row alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: HostHead) -> Tensor:
        losses, gradient = losses_and_gradient(
            hidden, targets, head.parts(hidden.device), getattr(head, "bias", None)
        )
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0].unsqueeze(1)).to(gradient.dtype), None, None


def refusal(head: Any) -> str | None:
    """Return why a head cannot lie on the host; None if it can."""
    if not (type(head) is nn.Linear or getattr(head, "folded", False)):
        return f"{type(head).__name__} is no plain matrix"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "it is trained"
    return "something looks at its outputs" if head._forward_hooks else None
