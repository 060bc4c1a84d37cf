"""DeepSpeed on the device that is here: the other tests take it for a CPU's."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from raytune_ft.cluster import ALLOCATION

if torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cuda"
    for name, value in ALLOCATION.items():  # as a run has it
        os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def empty_device() -> Iterator[None]:
    """Let models go that only cycles hold, which otherwise stay beside those of the next test."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let attention add up its gradients in one order, so that bits can be compared."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def whole_device() -> Iterator[None]:
    """Give the allocator all of the device back that a test has taken from it."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
