"""Processes of tests: fresh ones, forked from one that has the slow imports and nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing as mp

IMPORTED = [
    "bitsandbytes", "deepspeed", "peft", "transformers.models.llama.modeling_llama",
    "raytune_ft.training.worker",
]  # fmt: skip
"""Modules that take seconds to import and draw nothing."""


def forks() -> ForkServerContext:
    """Return the context that makes such processes; only the first call's imports count."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], n: int) -> None:
    """Run `work(rank, *arguments)` in `n` processes to the end; what one raises is raised."""
    forks()
    mp.start_processes(work, arguments, nprocs=n, start_method="forkserver")
