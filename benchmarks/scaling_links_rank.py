"""One rank of `scaling_links`: builds the engine that it is told, takes steps, tells their seconds.

Orders come through a pipe, whose descriptor is the last argument, so nothing but what ranks send
each other goes over the network.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.namespaces import DEVICE

MICRO_STEPS, TOKENS = 3, 16


def main() -> None:
    """Serve orders until the pipe is closed."""
    rank, world, folder, descriptor = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    pipe: Connection = Connection(int(descriptor))  # type: ignore[type-arg]
    import torch
    import torch.distributed as dist

    from benchmarks.traffic import Count, count

    torch.set_num_threads(1)
    seen, engine = Count(), None
    count(seen)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world
    )
    pipe.send("ready")
    while True:
        try:
            what, value = pipe.recv()
        except EOFError:
            return
        if what == "build":
            engine = build(value, Path(folder))
            pipe.send(sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
                      if "3" not in value else None)  # fmt: skip
        else:
            steps(engine, 1)  # what stands in buffers from before
            seen.take()
            before = bytes_out()
            seconds = steps(engine, value)
            found, out = seen.take(), bytes_out() - before
            each = {k: n / value for k, n in found.calls.items()}
            pipe.send((seconds, each, found.small_calls / value, out / value))


def bytes_out() -> int:
    """Return the bytes that this host's one interface has sent, headers included."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    (own,) = (line for line in lines if line.strip().startswith(f"{DEVICE}:"))
    return int(own.partition(":")[2].split()[8])


def build(zero: str, folder: Path) -> Any:
    """Make the engine of a preset or file, all weights trained in float32."""
    import torch

    from raytune_ft.config.schema import Recipe
    from raytune_ft.training.build import build_engine

    recipe = Recipe.model_validate({
        "model": {"path": str(folder / "model"), "method": "full", "dtype": "float32"},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {"micro_batch_size": 1, "accumulation": MICRO_STEPS, "deepspeed": zero,
                  "optimizer": "adamw"},
    })  # fmt: skip
    engine, _ = build_engine(recipe, folder / "model", torch.device("cpu"))
    return engine


def steps(engine: Any, n: int) -> list[float]:
    """Take optimizer steps on a batch that is always the same; ranks begin each together."""
    import torch
    import torch.distributed as dist

    ids = torch.arange(2, 2 + TOKENS)[None]
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(TOKENS)[None],
             "segment_ids": torch.zeros_like(ids)}  # fmt: skip
    targets = MICRO_STEPS * dist.get_world_size() * (TOKENS - 1)
    taken = []
    for _ in range(n):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(MICRO_STEPS):
            engine.forward_backward(batch, targets)
        engine.step(1e-4)
        taken.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    main()
