"""Host rows: a table in the host's memory and ids on a device in, the ids' rows on the device out.

A GPU reads pinned memory of the host itself, so that a kernel picks the rows: no id comes to the
host, nothing waits, and a CUDA graph may hold it. 2,048 rows of a 7B are 16 MiB.

Shapes: V = rows of the table, H = their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytune_ft.kernels.launch import ceil_div, has_triton

PROBES = 64
"""Rows that are looked at before a device's kernels are trusted to read the host."""


def gather(table: Tensor, ids: Tensor, *, directly: bool = True) -> Tensor:
    """Return the rows (..., H) of a table (V, H) that ids (...) name, on the ids' device.

    Args:
        table: contiguous; pinned if the ids are on a GPU and `directly` is set.
        ids: int64, each in 0..V-1.
        directly: let the device read the host's memory; else ids come to the host, which waits.
    """
    if directly and has_triton(ids):
        from raytune_ft.kernels import host_rows_triton

        out = table.new_empty(ids.numel(), table.shape[1], device=ids.device, pin_memory=False)
        host_rows_triton.gather(table, ids.reshape(-1).contiguous(), out)
        return out.view(*ids.shape, table.shape[1])
    rows = rows_there(table, ids.to(table.device))
    return rows.to(ids.device)


def rows_there(table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of ids on the table's own device."""
    return torch.nn.functional.embedding(ids, table)


def reads_host(table: Tensor, device: torch.device) -> str | None:
    """Return why a device's kernels do not read this table; None if they do, to the bit."""
    if device.type != "cuda":
        return "it is no GPU"
    step = max(1, ceil_div(len(table), PROBES))
    ids = torch.arange(0, len(table), step, device=device)
    try:
        found: Any = gather(table, ids).cpu()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None if torch.equal(found, rows_there(table, ids.cpu())) else "it reads other numbers"
