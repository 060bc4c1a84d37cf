"""`raytune-ft train` as people run it, with every rank's traffic and memory noted beside it.

The driver and its workers are the product's own; the worker's entry is wrapped, so that each
optimizer step adds a line to `RUN/traffic_K.jsonl` of rank K. Bytes are those that
torch.distributed is asked for, which costs a microsecond a call.
Run: python -m benchmarks.counted --config RECIPE [key=value ...]
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from raytune_ft import fitting
from raytune_ft.fitting import train_loop_per_worker as real_loop
from raytune_ft.training.run_folder import append_jsonl


def counted_loop(config: dict[str, Any]) -> None:
    """Entry on each Ray Train worker."""
    import torch

    from benchmarks.traffic import Count, count
    from raytune_ft.training import loop
    from raytune_ft.training.engine import rank, world_size

    seen = Count()
    count(seen)
    real_step = loop.take_step
    file = Path(config["way"].path) / f"traffic_{rank()}.jsonl"

    def take_step(*args: Any, **kwargs: Any) -> Any:
        seen.take()
        taken = real_step(*args, **kwargs)
        told = seen.take()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        append_jsonl(file, {
            "micro_steps": len(args[1].micro_batches), "payloads": told.payloads,
            "calls": told.calls, "small": told.small, "sent": told.sent(world_size()), "peak": peak,
        })  # fmt: skip
        return taken

    loop.take_step = take_step
    try:
        real_loop(config)
    finally:
        loop.take_step = real_step


def main() -> None:
    """Train by the command line that follows."""
    from raytune_ft.cli import run_verb

    importable = importlib.import_module("benchmarks.counted")  # workers know no `__main__`
    fitting.train_loop_per_worker = importable.counted_loop
    run_verb("train")


if __name__ == "__main__":
    main()
