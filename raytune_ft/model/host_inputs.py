"""Layer inputs on the host: what recomputation keeps of each layer waits in pinned memory.

A layer that runs again in the backward pass needs its input alone, B x L x H numbers, half a GiB
for 2,048 tokens of a 7B. `Shelf.checkpoint` takes the place of torch's: the input leaves for the
host while its layer computes, and comes back while the layer behind it runs again. The numbers are
copied, so that gradients are those of recomputation without it, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raytune_ft.kernels.transfer import Arrival, begin, pinned

Room = tuple[torch.Size, torch.dtype]


class Shelf:
    """The places of one model's layer inputs, used again from pass to pass."""

    def __init__(self) -> None:
        self._free: dict[Room, list[Tensor]] = {}
        self._leaving: tuple[Tensor, Arrival] | None = None
        self._last: weakref.ref[Away] | None = None
        self.taken = 0
        """Places that were ever made."""

    def checkpoint(
        self, function: Callable[..., Any], *args: Any, stays: bool = False, **options: Any
    ) -> Any:
        """Call `function(*args)`, which runs again in the backward pass.

        Args:
            function: of a layer.
            args: the first is the layer's input, which nothing else holds; others are held.
            stays: keep the input on the device: the last layer's is needed first.
            options: of torch's checkpoint.
        """
        options = {"use_reentrant": False, **options}
        if not args or not torch.is_grad_enabled():
            return checkpoint(function, *args, **options)
        hidden, *others = args
        self._settle()
        away = Away(self, hidden, self._last() if self._last is not None else None)
        self._last = weakref.ref(away)
        if not stays:
            away.leave()
        # torch keeps the random state of the devices of tensors that it is given
        sign = hidden.new_empty(0)
        found = checkpoint(partial(_run, function, others, away), sign, **options)
        away.forget()
        return found

    def place(self, like: Tensor) -> Tensor:
        """Return pinned memory of the host for a tensor like this."""
        free = self._free.setdefault((like.shape, like.dtype), [])
        if free:
            return free.pop()
        self.taken += 1
        return pinned(like.shape, like.dtype, like.device)

    def give_back(self, place: Tensor) -> None:
        """Take a place back that nobody reads any more."""
        self._free[place.shape, place.dtype].append(place)

    def send(self, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the host; it is held until the next layer begins."""
        place = self.place(tensor)
        self._leaving = tensor, begin(place, tensor)
        return place

    def _settle(self) -> None:
        """Let go of what left last: the device waits for its copy, which has long been done."""
        if self._leaving is not None:
            self._leaving[1].wait()
            self._leaving = None

    def fetch(self, place: Tensor, device: torch.device) -> tuple[Tensor, Arrival]:
        """Begin to copy what stands in a place to the device."""
        self._settle()
        tensor = torch.empty(place.shape, dtype=place.dtype, device=device)
        return tensor, begin(tensor, place)


class Away:
    """An input of one layer, from its forward pass to its backward pass."""

    def __init__(self, shelf: Shelf, hidden: Tensor, before: Away | None) -> None:
        self._shelf, self._device = shelf, hidden.device
        self._first: Tensor | None = hidden
        self._asks = hidden.requires_grad
        self._place: Tensor | None = None
        self._back: tuple[Tensor, Arrival] | None = None
        self._before = None if before is None else weakref.ref(before)

    def take(self) -> Tensor:
        """Return the input: as it came in the forward pass, a copy of it in the backward pass."""
        if self._first is not None:
            return self._first
        tensor, arrival = self._back or self._fetched()
        arrival.wait()
        self._back = None if self._place is not None else (tensor, arrival)
        before = self._before() if self._before is not None else None
        if before is not None:
            before.come()
        return tensor.detach().requires_grad_(self._asks)

    def leave(self) -> None:
        """Begin to go to the host, while the layer computes."""
        if self._first is not None:
            self._place = self._shelf.send(self._first.detach())

    def forget(self) -> None:
        """Let go of the input behind the forward pass; what did not leave stays on the device."""
        if self._place is None and self._first is not None:
            self._back = self._first.detach(), Arrival()
        self._first = None

    def come(self) -> None:
        """Begin to come back, for the backward pass of the layer in front of one that runs now."""
        if self._back is None and self._place is not None:
            self._back = self._fetched()

    def _fetched(self) -> tuple[Tensor, Arrival]:
        if self._place is None:
            raise RuntimeError("a layer's input was asked for before its layer ran")
        return self._shelf.fetch(self._place, self._device)

    def __del__(self) -> None:
        if self._place is not None:
            self._shelf.give_back(self._place)


def _run(function: Callable[..., Any], others: list[Any], away: Away, _sign: Tensor) -> Any:
    return function(away.take(), *others)
