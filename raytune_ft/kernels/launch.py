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


@cache
def multiplies_in_triton(device: torch.device) -> bool:
    """Tell whether Triton's products are worth it: it knows no tensor cores before Ampere's."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def ceil_div(value: int, unit: int) -> int:
    """Return how many units hold `value`."""
    return -(-value // unit)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which products of `dtype` are summed: float32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 where Triton interprets."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def steps_each(device: torch.device, programs: int, steps: int, *, each: int) -> int:
    """Return how many steps of a long loop one program takes, so that a GPU is filled.

    Args:
        device: whose multiprocessors are to have work.
        programs: there are if none is cut.
        steps: of the whole loop.
        each: programs that a multiprocessor should have.

    It is a power of two, because kernels are compiled for it: lengths that vary make few forms.
    """
    parts = max(1, min(steps, processors(device) * each // programs))
    return 1 << (ceil_div(steps, parts) - 1).bit_length()
