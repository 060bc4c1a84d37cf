"""Graph memory: one stream and one pool of memory, for all graphs of an engine in turn.

A graph reads and writes at the addresses that its capture took, for good, so its memory is never
given back while it lives; but only one graph runs at a time, so all may have the same. torch hands
a pool's memory out by streams: captures on streams of their own share nothing. Passes that are not
captured can borrow it as well, if nothing of theirs lives on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GraphMemory:
    """Where graphs of one device are captured and work."""

    def __init__(self, device: torch.device) -> None:
        """Begin without any memory of `device`, a CUDA device."""
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._before = 0

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let what runs inside take memory from the pool; all of it has to be given back."""
        gc.collect()
        self._before = torch.cuda.memory_allocated(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            torch._C._cuda_beginAllocateCurrentStreamToPool(self.device.index, self.pool)
            try:
                yield
            finally:
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                torch._C._cuda_releasePool(self.device.index, self.pool)
                # cuBLAS would keep what it took on this stream
                torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(self.stream)

    def left(self) -> int:
        """Return the bytes that live on of what ran inside: a graph would write over them."""
        gc.collect()
        return max(0, torch.cuda.memory_allocated(self.device) - self._before)
