"""A frozen table on the host: what an embedding and an output head there have in common.

The weight becomes a buffer of the same name in pinned memory, so that state dicts stay as they
are, and nothing that goes through parameters (DeepSpeed's first exchange, a model's device) takes
the model for one of the host. It stays where it is when the model moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.kernels.transfer import pinned
from raytune_ft.model.fastpath.lane import turn_into


class HostTable:
    """Form of a module whose weight lies on the host."""

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and change what else the module has; of the table the type alone."""
        table = self._buffers.pop("weight")
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            dtype = fn(table[:0]).dtype
        finally:
            self._buffers["weight"] = table
        if dtype is not table.dtype:
            self._buffers["weight"] = on_host(table.to(dtype), pin=table.is_pinned())
        return self


def on_host(weight: Tensor, *, pin: bool) -> Tensor:
    """Return a copy of a weight in the host's memory, pinned or not."""
    device = torch.device("cuda" if pin else "cpu")
    return pinned(weight.shape, weight.dtype, device).copy_(weight.detach())


def put(module: Any, table: Tensor, form: type) -> None:
    """Give a module a form, and a table on the host for its weight."""
    del module._parameters["weight"]
    module.register_buffer("weight", table)
    turn_into(module, form)


def take_back(module: Any, weight: nn.Parameter) -> None:
    """Give a module its own class and a weight of its own again."""
    module.__class__ = type(module).__bases__[1]
    del module._buffers["weight"]
    module.register_parameter("weight", weight)
