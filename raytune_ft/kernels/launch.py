"""Launching: a tensor in, whether Triton runs on it out."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def has_triton(tensor: torch.Tensor) -> bool:
    """Tell whether Triton kernels run on `tensor`: on a GPU, or anywhere in their interpreter.

    The interpreter is Triton's own, switched on by TRITON_INTERPRET=1 before its first import.
    """
    wanted = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and find_spec("triton") is not None
