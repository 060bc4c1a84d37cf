"""Is the memory that `plan` predicts the memory that a step takes, and is the time?

Random weights of a real 7B shape go through `training.build.build_engine` and take real optimizer
steps of full packs, several documents in each; every cell is a process of its own. Printed for
each cell: peak by part as predicted, peak as measured (`torch.cuda.max_memory_allocated`), what the
device lost beside torch's allocator, seconds of a micro-step predicted and measured.
Run: python -m benchmarks.memory_plan [--cells all|method,length,micro,recompute[,zero] ...]
     [--model CARD] [--layers N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

ROW = 8
"""Documents in each pack."""
ACCUMULATION = 2
"""Enough for a forward pass beside the gradients of the one before."""
WARM, TIMED = 1, 2
AHEAD = 3
"""Processes that import while another measures."""


def main() -> None:
    """Run cells one after the other; print a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", default=["all"])
    parser.add_argument("--model", default="internlm_7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths: a rehearsal")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", help="one cell, once a line comes from stdin")
    args = parser.parse_args()
    if args.cell is not None:
        measure(args)
        return
    cells = list(all_cells()) if args.cells == ["all"] else args.cells
    for line in measured(cells, args):
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def all_cells() -> Iterator[str]:
    """Yield 7B QLoRA and LoRA at 3 lengths, 2 micro-batches, with and without recomputation."""
    for method, length, large, again in product(
        ("nf4", "none"), (512, 2048, 4096), (False, True), ("on", "off")
    ):
        micro = (2 if length == 4096 else 4) if large else 1
        yield f"{method},{length},{micro},{again}"


def measured(cells: list[str], args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each cell; the next processes import meanwhile."""
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--model", args.model]
    command += ["--shrink", str(args.shrink)]
    if args.layers is not None:
        command += ["--layers", str(args.layers)]
    waiting: list[tuple[str, subprocess.Popen[str]]] = []
    left = list(cells)
    while left or waiting:
        while left and len(waiting) < AHEAD:
            cell = left.pop(0)
            child = subprocess.Popen(
                [*command, "--cell", cell], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            waiting.append((cell, child))
        cell, child = waiting.pop(0)
        output, _ = child.communicate("go\n")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        yield lines[-1] if lines else json.dumps({"cell": cell, "failed": child.returncode})


def recipe_of(cell: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the recipe of a cell and the shape of its model."""
    from raytune_ft.config import catalog
    from raytune_ft.config.schema import Recipe

    method, length, micro, again, *rest = cell.split(",")
    shape = dict(catalog.card(args.model).config)
    shape["max_position_embeddings"] = max(8192, shape["max_position_embeddings"])
    if args.layers is not None:
        shape["num_hidden_layers"] = args.layers
    if args.shrink > 1:
        for key in ("hidden_size", "intermediate_size", "vocab_size"):
            shape[key] //= args.shrink
        shape["head_dim"] = shape["hidden_size"] // shape["num_attention_heads"]
    body = catalog.body_for(args.model, "qlora/oasst1_e3")
    body["model"] |= {
        "quantization": "none" if method == "full" else method,
        "method": "full" if method == "full" else "lora",
        "gradient_checkpointing": again == "on",
    }
    body["data"]["max_length"] = int(length)
    body["train"] |= {"micro_batch_size": int(micro), "accumulation": ACCUMULATION}
    for setting in rest:  # such as zero1, train.optimizer=adamw, lora.dropout=0
        name, is_pair, value = setting.partition("=")
        section, _, key = name.partition(".")
        if is_pair:
            body.setdefault(section, {})[key] = json.loads(value) if value[0].isdigit() else value
        else:
            body["train"]["deepspeed"] = name
    return Recipe.model_validate(body), shape


def measure(args: argparse.Namespace) -> None:
    """Build, train and print what was predicted and measured."""
    import deepspeed  # noqa: F401 its import takes seconds
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from benchmarks.random_model import random_model
    from raytune_ft.model import loading
    from raytune_ft.training.build import build_engine

    sys.stdin.readline()
    recipe, shape = recipe_of(args.cell, args)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    marks = Marks(device)
    loading.load_model = lambda *_, **__: made(marks, shape, recipe, device)  # type: ignore
    began = time.perf_counter()
    random = random_model

    def made(marks: Marks, shape: Any, recipe: Any, device: Any) -> Any:
        model = random(shape, recipe.model, device)
        marks.reset()
        marks.add("base")
        return model

    engine, _ = build_engine(recipe, Path(), device)
    marks.add("engine")
    ready = time.perf_counter() - began
    times = steps(engine, recipe, shape["vocab_size"], marks)
    print(json.dumps({
        "cell": args.cell,
        "model": args.model,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "ready_s": round(ready, 1),
        **prediction(recipe, shape, on_gpu=on_gpu),
        "peak": marks.peak,
        "outside": marks.outside(),
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "marks": marks.seen,
        **times,
    }))  # fmt: skip


def prediction(recipe: Any, shape: Any, *, on_gpu: bool) -> dict[str, Any]:
    """Return what the planner says of this recipe."""
    from raytune_ft.config.footprint import count, memory_bytes

    return {"parts": memory_bytes(recipe, count(shape, recipe), on_gpu=on_gpu)}


def steps(engine: Any, recipe: Any, vocabulary: int, marks: Marks) -> dict[str, Any]:
    """Take optimizer steps; return seconds of a micro-step and of the update, and tokens/s."""
    micro, update = [], []
    train = recipe.train
    batch, n_targets = full_packs(recipe, vocabulary)
    for number in range(WARM + TIMED):
        engine.module.train()
        for index in range(train.accumulation):
            started = marks.now()
            engine.forward_backward(batch, n_targets * train.accumulation)
            micro.append(marks.now() - started)
            if number < WARM:
                marks.add(f"micro {number}.{index}")
        started = marks.now()
        engine.step(1e-4)
        update.append(marks.now() - started)
        marks.add(f"step {number}")
    micro, update = sorted(micro[WARM * train.accumulation :]), sorted(update[WARM:])
    tokens = train.micro_batch_size * recipe.data.max_length
    return {
        "micro_s": round(micro[len(micro) // 2], 4),
        "micro_range_s": [round(micro[0], 4), round(micro[-1], 4)],
        "update_s": round(update[len(update) // 2], 4),
        "tokens_per_s": round(tokens / micro[len(micro) // 2]),
    }


def full_packs(recipe: Any, vocabulary: int) -> tuple[Any, int]:
    """Return a micro-batch of full packs of random tokens, every one of them trained."""
    import numpy as np

    from raytune_ft.data.packing import IGNORE_INDEX, Pack, collate
    from raytune_ft.training.batching import count_targets, to_tensors

    rng, length = np.random.default_rng(0), recipe.data.max_length
    packs = []
    for _ in range(recipe.train.micro_batch_size):
        ends = np.linspace(0, length, ROW + 1).astype(np.int32)
        sizes = np.diff(ends)
        ids = rng.integers(3, vocabulary, length).astype(np.int32)
        labels = ids.copy()
        labels[ends[:-1]] = IGNORE_INDEX
        positions = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
        packs.append(Pack(ids, labels, positions, ends, np.arange(ROW)))
    return to_tensors(collate(packs)), sum(count_targets(pack) for pack in packs)


class Marks:
    """Memory after each stage, and its peak since the model was made, in bytes."""

    def __init__(self, device: Any) -> None:
        import torch

        self.torch, self.on_gpu = torch, device.type == "cuda"
        self.seen: dict[str, list[int]] = {}
        self.peak = 0

    def reset(self) -> None:
        """Forget what making the model took."""
        if self.on_gpu:
            self.torch.cuda.reset_peak_memory_stats()

    def add(self, name: str) -> None:
        """Note what is allocated now, and the most since the mark before."""
        if self.on_gpu:
            cuda = self.torch.cuda
            now, most = cuda.memory_allocated(), cuda.max_memory_allocated()
            cuda.reset_peak_memory_stats()
        else:
            now = most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seen[name] = [now, most]
        self.peak = max(self.peak, most)

    def outside(self) -> int:
        """Return what the device lost that torch's allocator does not hold."""
        if not self.on_gpu:
            return 0
        free, total = self.torch.cuda.mem_get_info()
        return int(total - free - self.torch.cuda.memory_reserved())

    def now(self) -> float:
        """Return the time once the device has done its work, in seconds."""
        if self.on_gpu:
            self.torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
