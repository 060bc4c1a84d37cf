"""Is the memory that `plan` predicts the memory that a step takes, and is the time?

Random weights of a real 7B shape go through `training.build.build_engine` and take real optimizer
steps of full packs, several documents in each; every cell is a process of its own. A cell's line of
JSON has the peak by torch's allocator (`torch.cuda.max_memory_allocated`), what the device lost
beside that allocator, and seconds of a micro-step and of an update. The table sets them against
what `config.estimates.peak` and `config.estimates.pace` say.
RECOMPUTE is on, off, or how many of the layers, the first ones, recompute; cells are those of
transformers' and peft's own way unless model.fast_path=auto is among a cell's settings.
Run: python -m benchmarks.memory_plan [--cells all|METHOD,LENGTH,MICRO,RECOMPUTE[,SETTING...] ...]
     [--model CARD] [--layers N] [--out FILE];  python -m benchmarks.memory_plan --table FILE
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

GIB = 2**30
ROWS = 8
"""Documents in each pack."""
ACCUMULATION = 2
"""Enough for a forward pass beside the gradients of the one before."""
WARM, TIMED = 2, 2
RESIDENT = "resident"
"""A cell's setting: the fast path's layers keep a quantised base unpacked."""
HOSTED = ("hosted1", "hosted2", "hosted3")
"""Others: the embedding lies on the host; layer inputs, too; the head, too."""
AHEAD = 2
"""Processes alive: one measures, the other imports."""


def main() -> None:
    """Run cells one after the other and print a line of JSON for each, or a table of lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", default=["all"])
    parser.add_argument("--model", default="internlm_7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths: a rehearsal")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of an --out file")
    args = parser.parse_args()
    if args.table is not None:
        print_table(args.table)
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
    """Yield a line for each cell, made by a process of its own; the next one imports meanwhile."""
    context = multiprocessing.get_context("spawn")
    left, waiting = list(cells), []
    while left or waiting:
        while left and len(waiting) < AHEAD:
            cell = left.pop(0)
            ours, theirs = context.Pipe()
            child = context.Process(target=measure, args=(cell, args, theirs))
            child.start()
            theirs.close()
            waiting.append((cell, child, ours))
        cell, child, ours = waiting.pop(0)
        try:
            ours.send("go")
            yield ours.recv()
        except (EOFError, OSError):
            child.join()
            yield json.dumps({"cell": cell, "model": args.model, "failed": child.exitcode})
        child.join()


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
        "gradient_checkpointing": int(again) if again.isdigit() else again == "on",
        "fast_path": False,
    }
    body["data"]["max_length"] = int(length)
    sizes = {"micro_batch_size": int(micro), "accumulation": ACCUMULATION}
    body["train"] |= {"layout": "recipe", **sizes}
    # such as zero1, lora.dropout=0, model.fast_path=auto
    for setting in (one for one in rest if one != RESIDENT and one not in HOSTED):
        name, is_pair, value = setting.partition("=")
        section, _, key = name.partition(".")
        if is_pair:
            body.setdefault(section, {})[key] = json.loads(value) if value[0].isdigit() else value
        else:
            body["train"]["deepspeed"] = name
    return Recipe.model_validate(body), shape


def measure(cell: str, args: argparse.Namespace, pipe: Any) -> None:
    """Build, train and send what was measured, once something comes."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from benchmarks.random_model import random_model
    from raytune_ft.model import loading
    from raytune_ft.model.probe import probe
    from raytune_ft.training.build import build_engine

    pipe.recv()
    recipe, shape = recipe_of(cell, args)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    marks = Marks(device)

    def made(*_: Any, **__: Any) -> Any:
        model = random_model(shape, recipe.model, device)
        marks.reset()
        marks.add("base")
        return model

    loading.load_model = made  # 14 GB from a disk would take longer than the steps
    rates = probe(device).__dict__ if on_gpu else None
    began = time.perf_counter()
    engine, _ = build_engine(recipe, Path(), device, **way_of(cell))
    marks.add("engine")
    ready = time.perf_counter() - began
    times = steps(engine, recipe, shape["vocab_size"], marks)
    pipe.send(json.dumps({
        "cell": cell,
        "model": args.model,
        "shape": {key: shape[key] for key in CHANGED},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "rates": rates,
        "ready_s": round(ready, 1),
        "peak": marks.peak,
        "outside": marks.outside(),
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "marks": marks.seen,
        **times,
    }))  # fmt: skip


def way_of(cell: str) -> dict[str, Any]:
    """Return whether a cell's base lies unpacked beside its codes, and what lies on the host."""
    from raytune_ft.config.estimates.setting import LADDER

    words = cell.split(",")
    steps = [HOSTED.index(word) for word in words if word in HOSTED]
    return {"resident": RESIDENT in words, "hosted": LADDER[steps[0]] if steps else ()}


CHANGED = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
"""What a rehearsal changes of a model's shape."""


def print_table(file: Path) -> None:
    """Print as Markdown what is predicted now beside what was measured in a file of lines."""
    from raytune_ft.config.estimates.footprint import count
    from raytune_ft.config.estimates.pace import device_called, micro_seconds
    from raytune_ft.config.estimates.peak import memory_bytes

    parts_shown = ("base weights", "weights unpacked", "quantisation state", "embedding and head",
                   "adapter", "gradients", "optimizer", "activations", "logits",
                   "workspace")  # fmt: skip
    columns = ["model", "cell", *parts_shown, "sum", "measured", "ratio",
               "beside torch, predicted / measured", "s, by the name", "s, by the probe",
               "measured", "ratio", "tok/s"]  # fmt: skip
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    args = argparse.Namespace(layers=None, shrink=1)
    for line in file.read_text(encoding="utf-8").splitlines():
        got = json.loads(line)
        args.model = got["model"]
        if "failed" in got:
            print(f"| {got['model']} | {got['cell']} | failed |")
            continue
        recipe, shape = recipe_of(got["cell"], args)
        counts = count(shape | got["shape"], recipe)
        way = way_of(got["cell"])
        parts = memory_bytes(recipe, counts, on_gpu=got["outside"] > 0, **way)
        beside = parts.pop("GPU context", 0)
        total = sum(parts.values())
        known = device_called(got["device"])
        seconds = [
            micro_seconds(recipe, counts, one, **way) for one in (known, _probed(got)) if one
        ] or [0.0]
        sizes = " | ".join(f"{parts.get(name, 0) / GIB:.2f}" for name in parts_shown)
        print(
            f"| {got['model']} | {got['cell']} | {sizes} | {total / GIB:.2f} | "
            f"{got['peak'] / GIB:.2f} | {total / got['peak']:.3f} | {beside / GIB:.2f} / "
            f"{got['outside'] / GIB:.2f} | {seconds[0]:.3f} | {seconds[-1]:.3f} | "
            f"{got['micro_s']:.3f} | {seconds[-1] / got['micro_s']:.2f} | "
            f"{got['tokens_per_s']:,} |"
        )


def _probed(got: dict[str, Any]) -> Any:
    from raytune_ft.config.estimates.pace import Device

    return Device(**got["rates"]) if got.get("rates") else None


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
        ends = np.linspace(0, length, ROWS + 1).astype(np.int32)
        sizes = np.diff(ends)
        ids = rng.integers(3, vocabulary, length).astype(np.int32)
        labels = ids.copy()
        labels[ends[:-1]] = IGNORE_INDEX
        positions = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
        packs.append(Pack(ids, labels, positions, ends, np.arange(ROWS)))
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
