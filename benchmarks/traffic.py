"""Traffic: what ranks send each other, counted as torch.distributed is asked.

`Count` puts itself round the collectives of torch.distributed, which DeepSpeed, the plain engine
and our own exchanges all call; it reads sizes and no tensor. The model that it is held against is
`raytune_ft.config.estimates.traffic`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from raytune_ft.config.estimates.traffic import sent

KINDS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_gather": ("all_gather", "tensor_list"),
    "all_gather_into_tensor": ("all_gather", "output_tensor"),
    "all_gather_single": ("all_gather", "output_tensor"),
    "_all_gather_base": ("all_gather", "output_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_single": ("reduce_scatter", "input"),
    "_reduce_scatter_base": ("reduce_scatter", "input"),
    "broadcast": ("broadcast", "tensor"),
    "reduce": ("reduce", "tensor"),
}
"""Function of torch.distributed -> kind, and the argument that is the payload."""
SMALL = 1024
"""Bytes; below are norms, flags and losses, which every step exchanges whatever it trains."""


@dataclass
class Count:
    """Payloads of the collectives of this process since the last `take`."""

    payloads: dict[str, int] = field(default_factory=dict)
    """Kind -> bytes, of collectives of `SMALL` bytes and more."""
    calls: dict[str, int] = field(default_factory=dict)
    small: int = 0
    """Bytes of the others."""
    small_calls: int = 0

    def add(self, kind: str, size: int) -> None:
        """Note one collective."""
        if size < SMALL:
            self.small += size
            self.small_calls += 1
            return
        self.payloads[kind] = self.payloads.get(kind, 0) + size
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def take(self) -> Count:
        """Return what was counted, and begin anew."""
        taken = Count(self.payloads, self.calls, self.small, self.small_calls)
        self.payloads, self.calls, self.small, self.small_calls = {}, {}, 0, 0
        return taken

    def sent(self, ranks: int) -> float:
        """Return the bytes that one of so many ranks sends for them."""
        return sum(sent(kind, size, ranks) for kind, size in self.payloads.items())


def count(into: Count) -> Callable[[], None]:
    """Count every collective of this process; return what ends that.

    DeepSpeed keeps some of these functions from its start on, so this goes before it.
    """
    kept = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}
    for name, real in kept.items():
        setattr(dist, name, _counted(real, *KINDS[name], into))

    def end() -> None:
        for name, real in kept.items():
            setattr(dist, name, real)

    return end


@contextmanager
def counted() -> Iterator[Count]:
    """Count while the block runs."""
    into = Count()
    end = count(into)
    try:
        yield into
    finally:
        end()


def _counted(real: Any, kind: str, argument: str, into: Count) -> Any:
    names = list(inspect.signature(real).parameters)
    place = names.index(argument)

    @functools.wraps(real)
    def counting(*args: Any, **kwargs: Any) -> Any:
        given = kwargs[argument] if argument in kwargs else args[place]
        into.add(kind, _size(given))
        return real(*args, **kwargs)

    return counting


def _size(given: Any) -> int:
    if torch.is_tensor(given):
        return given.numel() * given.element_size()
    return sum(_size(one) for one in given)
