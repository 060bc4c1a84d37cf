"""Capture: a pass that ran before in, its CUDA graph and what it writes out.

Training's passes and those of answers are captured here alike. A capture that fails leaves torch's
allocator and random state as in its middle; both are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import torch

_one_at_a_time = Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of captures: cuBLAS keeps a workspace for every one that it sees."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on the stream that captures of a device use."""
    stream, current = stream_of(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also before a cache that did not work out is given back
        current.wait_stream(stream)


def capture(
    work: Callable[[], torch.Tensor], pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture work that ran before on the same stream.

    Args:
        work: starts the same kernels each time; its result is overwritten by each replay.
        pool: whose memory the graph takes, `torch.cuda.graph_pool_handle`.
        stream: of the device that the work is on.

    Raises:
        RuntimeError: it did not work out; allocator and random state are as before.
    """
    graph, index = torch.cuda.CUDAGraph(), stream.device.index
    generator = torch.cuda.default_generators[index]
    state = generator.clone_state()
    try:
        # cuBLAS takes its workspace anew, so that it lies in the graph's own memory
        torch._C._cuda_clearCublasWorkspaces()
        # other threads, such as the one that watches collectives, may ask the device meanwhile
        capturing = torch.cuda.graph(graph, pool, stream, "thread_local")
        with _one_at_a_time, torch.cuda.stream(stream), capturing:
            return graph, work()
    except RuntimeError:
        # an end that fails leaves both as they are in the middle of a capture
        generator.graphsafe_set_state(state)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()
