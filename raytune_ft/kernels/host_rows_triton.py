"""The Triton form of `host_rows.gather`: a program for each row."""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 2048
"""Columns at a time: reads over the bus are slow to come, so many go out at once."""


def gather(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write the rows of ids (n,) of a table (V, H), contiguous and pinned, to `out` (n, H)."""
    n, width = out.shape
    if n:
        block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
        _gather[(n,)](table, ids, out, WIDTH=width, BLOCK=block)


@triton.jit
def _gather(table, ids, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < WIDTH
        found = tl.load(table + row * WIDTH + column, mask=there)
        tl.store(out + place * WIDTH + column, found, mask=there)
