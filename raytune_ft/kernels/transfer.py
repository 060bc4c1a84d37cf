"""Transfers: copies between the host and a device beside what the device computes.

A stream for each direction, and events instead of waiting: a copy begins when the device has done
what it was told before, and who needs the result lets the device wait for it, never the host. On a
CPU the same calls copy at once, so that one code path serves both.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["in", "out"]


class Arrival:
    """The end of a copy."""

    def __init__(self, event: Any = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Let the current stream go on only when the copy is done."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


def begin(target: Tensor, source: Tensor) -> Arrival:
    """Begin to copy `source` to `target`, one of them on the host and pinned.

    Both have to stay as they are until the arrival was waited for. What the current stream does
    later runs beside the copy.
    """
    device = target.device if target.is_cuda else source.device
    if device.type != "cuda":
        target.copy_(source)
        return Arrival()
    stream = _stream(device, "in" if target.is_cuda else "out")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return Arrival(stream.record_event())


def pinned(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of the host that copies to and from `device` at full speed."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


@cache
def _stream(device: torch.device, direction: Direction) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
