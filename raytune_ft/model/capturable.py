"""Whether a pass can be captured as a CUDA graph: a mode of torch that watches one.

A capture that fails would leave torch's allocator and random state as in its middle, so what a
graph cannot repeat is found before, while the pass runs as usual. What custom kernels do inside is
not seen, so only those are let through that are known to stay on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NotFixedError(Exception):
    """A pass cannot be one of fixed shapes; says why. Whoever asked then goes on without."""


class Watch(TorchDispatchMode):
    """Raise NotFixedError at the first operation that a CUDA graph cannot repeat."""

    SPACES = ("aten", "prims", "prim", "bitsandbytes")
    OPAQUE = ("gemm_4bit", "gemv_4bit", "dequantize_4bit", "dequantize_blockwise")
    """Of bitsandbytes; its int8 layers look for outliers on the host."""
    ATTENTION = (
        "_scaled_dot_product", "_fused_sdp_choice", "_flash_attention", "_efficient_attention",
        "_cudnn_attention",
    )  # fmt: skip
    TAGS = frozenset(
        (
            torch.Tag.data_dependent_output,
            torch.Tag.dynamic_output_shape,
            torch.Tag.nondeterministic_seeded,
        )
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation if it can be repeated."""
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space not in self.SPACES or (space == "bitsandbytes" and name not in self.OPAQUE):
            raise NotFixedError(f"{func.name()} may wait for the device")
        if name in ("index", "index_put", "index_put_"):
            depends = _by_truth(args[1])
        elif name.startswith(self.ATTENTION):  # bears the mark of drawing, for its dropout
            depends = _dropout(func, args, kwargs or {}) > 0
        else:
            depends = not self.TAGS.isdisjoint(func.tags)
        if depends:
            raise NotFixedError(f"{func.name()} depends on values")
        found = func(*args, **(kwargs or {}))
        if name == "copy_" and _is_beside(args, kwargs or {}):
            return found
        if name in ("_to_copy", "copy_", "lift_fresh") and _crosses(name, args, found):
            raise NotFixedError(f"{func.name()} moves between host and device")
        return found


def _by_truth(indices: Any) -> bool:
    """Return whether an index is one of truth values: how many are true is only known there."""
    return any(some is not None and some.dtype in (torch.bool, torch.uint8) for some in indices)


def _dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> float:
    """Return the share of its weights that an operation of attention drops."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p")
            return float(given or 0.0)
    return 0.0


def _is_beside(args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy has memory of the host that stays, and nobody waits for it."""
    waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    on_host = [one for one in args[:2] if one.device.type == "cpu"]
    return not waits and all(one.is_pinned() for one in on_host)


def _crosses(name: str, args: Any, found: torch.Tensor) -> bool:
    if name == "lift_fresh":  # how a new tensor of host numbers looks once it is on the device
        return found.device.type != "cpu"
    source = args[1] if name == "copy_" else args[0]
    return bool(source.device != found.device)
