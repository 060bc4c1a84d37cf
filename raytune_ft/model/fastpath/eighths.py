"""Float8: a model on the fast path in, the same with its frozen products in float8, lines out.

Only training multiplies so; held-out losses, answers, the merged model and whoever loads the
adapter have the base's own weights (docs/fp8.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from raytune_ft.errors import ModelError
from raytune_ft.kernels import fp8
from raytune_ft.kernels.linear import Base


def check(compute: str, device: torch.device) -> None:
    """Refuse `model.compute: fp8` on a device that has none; ModelError with its name."""
    refused = fp8.refusal(device) if compute == "fp8" else None
    if refused is not None:
        raise ModelError(f"model.compute 'fp8': {refused}; leave it out here")


def into_fp8(
    bases: Iterable[Base], *, resident: bool, refused: Sequence[str] = ()
) -> tuple[str, ...]:
    """Let frozen weights be multiplied in float8; return what a run says about it.

    Args:
        bases: of all linear layers on the fast path.
        resident: keep them in float8 beside what is stored.
        refused: why others are not on the fast path.

    Raises:
        ModelError: none of them can be.
    """
    odd: Counter[str] = Counter()
    count, on_cpu = 0, False
    for base in bases:
        if not fp8.fits(base.shape):
            odd["{} x {}".format(*base.shape)] += 1
            if resident:
                base.resident()
            continue
        on_cpu = base.module.weight.device.type == "cpu"
        # a CPU would round all weights again in each pass, and needs one order of them
        base.in_fp8(resident=resident or on_cpu)
        count += 1
    if not count:
        why = "no linear layer is on the fast path, which docs/fast-path.md gives reasons for"
        if odd:
            why = f"all weights are like {next(iter(odd))}, no multiples of {fp8.UNIT}"
        elif refused:
            why = f"no linear layer is on the fast path ({'; '.join(refused)})"
        raise ModelError(f"model.compute 'fp8' does nothing here: {why}; leave it out")
    return tuple(_lines(count, odd, kept=resident, on_cpu=on_cpu))


def _lines(count: int, odd: Counter[str], *, kept: bool, on_cpu: bool) -> Iterable[str]:
    layers = f"{count} linear layer{'s' * (count != 1)}"
    how = "kept in float8" if kept or on_cpu else "rounded at each use"
    yield f"float8: frozen weights of {layers}, {how}"
    if on_cpu:
        yield "float8: emulated on a CPU, the same rounding, slower than without"
    for shape, times in odd.items():
        yield f"float8: not {times} of {shape}, no multiples of {fp8.UNIT}; in the model's type"
