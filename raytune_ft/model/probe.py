"""Probe: the rates of the GPU that is here, measured in a second; a device in, `pace.Device` out.

Only for a process that may hold a CUDA context: `plan` and benchmarks, not what starts workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from raytune_ft.config.estimates.pace import Device

TOKENS, INPUTS, OUTPUTS = 8192, 4096, 11008
"""Of a product as a 7B model's MLP has it."""
COPIED = 2**30
"""Bytes."""
STARTS = 500


def probe(device: torch.device) -> Device:
    """Measure large bfloat16 products, copies, and how fast this host starts operations."""
    with torch.no_grad():
        product, copy, start = _product(device), _copy(device), _start(device)
    torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.name,
        properties.total_memory,
        2 * TOKENS * INPUTS * OUTPUTS / product,
        2 * COPIED / copy,
        start,
        host=COPIED / 4 / _host(device),
        capability=torch.cuda.get_device_capability(device),
    )


def _product(device: torch.device) -> float:
    a = torch.randn(TOKENS, INPUTS, device=device, dtype=torch.bfloat16)
    b = torch.randn(INPUTS, OUTPUTS, device=device, dtype=torch.bfloat16)
    return _seconds(lambda: a @ b, 20)


def _copy(device: torch.device) -> float:
    source = torch.empty(COPIED, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), 20)


def _host(device: torch.device) -> float:
    """Return the seconds of a copy of a quarter of `COPIED` from pinned memory of the host."""
    source = torch.empty(COPIED // 4, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device, pin_memory=False)
    return _seconds(lambda: target.copy_(source, non_blocking=True), 5)


def _start(device: torch.device) -> float:
    cell = torch.zeros(8, device=device)
    # whatever else the host does now makes a run longer, never shorter
    return min(_seconds(lambda: cell.add_(1), STARTS) for _ in range(5))


def _seconds(work: Callable[[], object], times: int) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
