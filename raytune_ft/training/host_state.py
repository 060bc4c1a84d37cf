"""An optimizer's averages on the host: brought to the device and taken back part by part.

A paged optimizer's averages lie in memory that the driver moves page by page: 1.2 GiB of a 7B's
adapter stay on the device as long as there is room, and are in its way where there is none. Here
they wait in pinned memory, end to end, and a step brings parts of them ahead of the kernel that
updates. It is the same kernel on the same numbers, so weights and averages are the paged
optimizer's, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor

from raytune_ft.config.estimates.setting import STATE_AHEAD, STATE_PART
from raytune_ft.kernels.transfer import Arrival, begin, pinned

PART = STATE_PART
"""Elements at a time."""
ALIGNED = 64
"""Elements of which a weight's averages begin at a multiple."""
AVERAGES = ("state1", "state2")


@dataclass
class _Piece:
    """A stretch of one weight, whose averages lie in a part."""

    group: dict[str, Any]
    weight: Tensor
    """(n,), on the device, as its gradient."""
    gradient: Tensor
    step: int
    place: slice
    """In the part."""


@dataclass
class _Part:
    """A stretch of all averages."""

    averages: tuple[Tensor, ...]
    """On the host."""
    device: torch.device
    pieces: list[_Piece] = field(default_factory=list)
    here: tuple[Tensor, ...] = ()
    """On the device."""
    arrivals: tuple[Arrival, ...] = ()

    def come(self) -> None:
        """Send the averages to the device."""
        self.here = tuple(torch.empty_like(one, device=self.device) for one in self.averages)
        self.arrivals = tuple(map(begin, self.here, self.averages))

    def update(self) -> None:
        """Take the optimizer's step, and send the averages back."""
        self.wait()
        for piece in self.pieces:
            _update(piece, *(one[piece.place] for one in self.here))
        self.arrivals = tuple(map(begin, self.averages, self.here))

    def wait(self) -> None:
        """Let the device wait for what is on its way."""
        for arrival in self.arrivals:
            arrival.wait()

    def go(self) -> None:
        """Give the device's memory back, once all has left."""
        self.wait()
        self.here = ()


class HostAdamW(Optimizer2State):  # type: ignore[misc]
    """A 32-bit AdamW of bitsandbytes whose averages lie on the host; see the module."""

    _flats: tuple[Tensor, ...] = ()
    """All of either average, end to end."""
    _starts: dict[Tensor, int]
    """Where a weight's averages begin in them."""

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        """Give a weight its averages, zeros."""
        if not self._flats:
            self._lay_out(p.device)
        place = slice(self._starts[p], self._starts[p] + p.numel())
        averages = {
            name: flat[place].view(p.shape).zero_()
            for name, flat in zip(AVERAGES, self._flats, strict=True)
        }
        self.state[p] = {"step": 0, **averages}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step; gradients are there already."""
        coming, leaving = deque[_Part](), deque[_Part]()
        parts = iter(self._parts())
        while True:
            while len(coming) <= STATE_AHEAD and (part := next(parts, None)) is not None:
                part.come()
                coming.append(part)
            if not coming:
                break
            leaving.append(coming.popleft())
            leaving[-1].update()
            if len(leaving) > STATE_AHEAD:
                leaving.popleft().go()
        for part in leaving:
            part.go()
        if leaving and leaving[-1].device.type == "cuda":  # the host may read averages now
            torch.cuda.current_stream(leaving[-1].device).synchronize()

    def _weights(self) -> Iterator[tuple[int, int, dict[str, Any], Tensor]]:
        for number, group in enumerate(self.param_groups):
            for place, weight in enumerate(group["params"]):
                yield number, place, group, weight

    def _lay_out(self, device: torch.device) -> None:
        self._starts, end = {}, 0
        for _, _, _, weight in self._weights():
            self._starts[weight] = end
            end += -(-weight.numel() // ALIGNED) * ALIGNED
        self._flats = tuple(pinned((end,), torch.float32, device).zero_() for _ in AVERAGES)

    def _parts(self) -> list[_Part]:
        found: dict[int, _Part] = {}
        for number, place, group, weight in self._weights():
            if weight.grad is None:
                continue
            if not self.state[weight]:
                self.init_state(group, weight, number, place)
            self.state[weight]["step"] += 1
            for index, piece in self._pieces(group, weight):
                if index not in found:
                    stretch = slice(index * PART, (index + 1) * PART)
                    averages = tuple(flat[stretch] for flat in self._flats)
                    found[index] = _Part(averages, weight.device)
                found[index].pieces.append(piece)
        return list(found.values())

    def _pieces(self, group: dict[str, Any], weight: Tensor) -> Iterator[tuple[int, _Piece]]:
        """Yield the stretches of a weight, with the number of each one's part."""
        flat, gradient = weight.data.view(-1), weight.grad.contiguous().view(-1)  # type: ignore[union-attr]
        step, first = self.state[weight]["step"], self._starts[weight]
        start = 0
        while start < len(flat):
            index, inside = divmod(first + start, PART)
            size = min(PART - inside, len(flat) - start)
            of_weight, place = slice(start, start + size), slice(inside, inside + size)
            yield index, _Piece(group, flat[of_weight], gradient[of_weight], step, place)
            start += size


def _update(piece: _Piece, first: Tensor, second: Tensor) -> None:
    group = piece.group
    functional.optimizer_update_32bit(
        "adam", piece.gradient, piece.weight, first, group["betas"][0], group["eps"], piece.step,
        group["lr"], second, group["betas"][1], weight_decay=group["weight_decay"],
    )  # fmt: skip


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Let a 32-bit AdamW of bitsandbytes that took no step yet keep its averages on the host."""
    if not isinstance(optimizer, Optimizer2State) or optimizer.state:
        raise TypeError("averages go to the host before an AdamW's first step")
    optimizer.__class__ = HostAdamW
