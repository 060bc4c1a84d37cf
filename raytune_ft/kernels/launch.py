"""Where a kernel runs: Triton on a GPU and in its interpreter, plain torch everywhere else."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


def has_triton(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's kernels run by Triton: it is on a GPU, or Triton interprets.

    Triton reads TRITON_INTERPRET when it is imported; set it before the process starts.
    """
    return (tensor.is_cuda or interprets()) and _installed()


def interprets() -> bool:
    """Tell whether Triton's interpreter was asked for, which takes tensors on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def ceil_div(value: int, unit: int) -> int:
    """Return how many units hold `value`."""
    return -(-value // unit)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which products of `dtype` are summed: float32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
