"""An optimizer's averages on the host: brought to the device and taken back part by part.

A paged optimizer's averages lie in memory that the driver moves page by page: 1.2 GiB of a 7B's
adapter stay on the device as long as there is room, and are in its way where there is none. Here
they wait in pinned memory, and a step brings parts of them ahead of the kernel that updates. It is
the same kernel on the same numbers, so weights and averages are the paged optimizer's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor

from raytune_ft.kernels.transfer import Arrival, begin, pinned

PART = 2**22
"""Weights at a time: twice 16 MiB of averages."""
AHEAD = 2
"""Parts that are on their way while one is updated."""
AVERAGES = ("state1", "state2")


@dataclass
class _Part:
    """A stretch of one weight's elements."""

    group: dict[str, Any]
    weight: Tensor
    gradient: Tensor
    step: int
    averages: tuple[Tensor, Tensor]
    """On the host."""
    here: tuple[Tensor, ...] = ()
    """On the device."""
    arrivals: tuple[Arrival, ...] = ()

    def come(self) -> None:
        """Send the averages to the device."""
        device = self.weight.device
        self.here = tuple(torch.empty_like(one, device=device) for one in self.averages)
        self.arrivals = tuple(map(begin, self.here, self.averages))

    def update(self) -> None:
        """Take the optimizer's step, and send the averages back."""
        for arrival in self.arrivals:
            arrival.wait()
        group = self.group
        functional.optimizer_update_32bit(
            "adam", self.gradient, self.weight, self.here[0], group["betas"][0], group["eps"],
            self.step, group["lr"], self.here[1], group["betas"][1],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
        self.arrivals = tuple(map(begin, self.averages, self.here))

    def leave(self) -> None:
        """Let the device's memory go, behind the averages' way back."""
        for arrival in self.arrivals:
            arrival.wait()
        self.here = ()


class HostAdamW(Optimizer2State):  # type: ignore[misc]
    """A 32-bit AdamW of bitsandbytes whose averages lie on the host; see the module."""

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an average's memory, zeros."""
        return pinned(p.shape, dtype, p.device).zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step; gradients are there already."""
        waiting: list[_Part] = []
        done: list[_Part] = []
        for part in self._parts():
            part.come()
            waiting.append(part)
            if len(waiting) > AHEAD:
                self._update(waiting, done)
        while waiting:
            self._update(waiting, done)
        for part in done:
            part.leave()
        if self._on_gpu():  # the host may read the averages now
            torch.cuda.current_stream().synchronize()

    def _update(self, waiting: list[_Part], done: list[_Part]) -> None:
        done.append(waiting.pop(0))
        done[-1].update()
        if len(done) > AHEAD:
            done.pop(0).leave()

    def _parts(self) -> Iterator[_Part]:
        for number, group in enumerate(self.param_groups):
            for place, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    self.init_state(group, weight, number, place)
                state["step"] += 1
                yield from _cut(group, weight, state)

    def _on_gpu(self) -> bool:
        return any(weight.is_cuda for group in self.param_groups for weight in group["params"])


def _cut(group: dict[str, Any], weight: Tensor, state: dict[str, Any]) -> Iterator[_Part]:
    flat = [weight.data.view(-1), weight.grad.contiguous().view(-1)]  # type: ignore[union-attr]
    averages = [state[name].view(-1) for name in AVERAGES]
    for start in range(0, weight.numel(), PART):
        of_device = [one[start : start + PART] for one in flat]
        of_host = [one[start : start + PART] for one in averages]
        yield _Part(group, of_device[0], of_device[1], state["step"], (of_host[0], of_host[1]))


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Let a 32-bit AdamW of bitsandbytes that took no step yet keep its averages on the host."""
    if not isinstance(optimizer, Optimizer2State) or optimizer.state:
        raise TypeError("averages go to the host before an AdamW's first step")
    optimizer.__class__ = HostAdamW
