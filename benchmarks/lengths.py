"""How fast, and in how much memory, is a QLoRA step of a 7B model at long contexts; how long can
a context be?

The shipped recipe internlm_7b_qlora_oasst1_e3 with automatic settings, one document of the whole
length in each pack, random ids and weights. First come speeds and memory at given lengths, ours and
peers beside each other (variants of benchmarks.peers, their own ways for long contexts left on).
Then, under hard caps of the device's memory, the longest context that trains: torch's allocator
refuses what goes beyond, and a bisection begins at what the plan says. Every cell and every try is
a process of its own, which imports while the one before measures. An optimizer step has 16 x 2048
tokens, or one pack where that is longer; tries take a step of one pack.
Run: python -m benchmarks.lengths [--lengths N ...] [--sides ours unsloth ...] [--caps GIB ...]
     [--parts speed longest] [--unsloth-site DIR] [--budget SECONDS] [--out FILE]
     python -m benchmarks.lengths --table FILE;  rehearsal without a GPU: --tiny
Prints lines of JSON, what was predicted in each, then tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import qlora_gpu, qlora_ours, qlora_rows
from benchmarks.lengths_table import print_tables
from benchmarks.lines import Lines

LENGTHS, CAPS, SIDES = (2048, 8192, 32768, 131072), (8.0, 16.0, 24.0, 80.0), ("ours", "unsloth")
STEP_TOKENS = 16 * 2048
LONG = 65536
"""Steps of so many tokens are timed once, without one before: they take a minute."""
MOST = 262144
"""Longer ones are not tried: a step of 32 layers would take minutes."""
UNIT = 1024
BUILD_S = 40.0
"""For a process, its model and what lies around a step."""
GIB = 2**30
TINY = {"lengths": [32, 64], "sides": ["ours", "hf"], "caps": [1.0, 2.0], "most": 256, "unit": 32,
        "shrink": 64, "layers": 2, "step_tokens": 128, "long": 10**9}  # fmt: skip
TINY_HOLDS = 64
"""Tokens for each GiB of cap that a rehearsal without a GPU pretends to have room for."""


def main() -> None:
    """Run what is asked for, or print the tables of lines."""
    args = arguments()
    if args.table is not None:
        print_tables([json.loads(line) for line in args.table.read_text().splitlines()])
        return
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as a run sets it
    bench = Lengths(args)
    bench.prepare()
    if "speed" in args.parts:
        bench.speeds()
    if "longest" in args.parts:
        for cap in args.caps:
            bench.longest(cap)
    print_tables(bench.lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--caps", nargs="+", type=float, default=list(CAPS), help="GiB")
    parser.add_argument("--parts", nargs="+", default=["speed", "longest"])
    parser.add_argument("--most", type=int, default=MOST, help="tokens that are tried at most")
    parser.add_argument("--tries", type=int, default=5, help="of each cap")
    parser.add_argument("--unsloth-site", type=Path)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds of all together")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, help="for what is made; a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of an --out file")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.set_defaults(shrink=1, unit=UNIT, step_tokens=STEP_TOKENS, long=LONG, cap=20.0, one=None)
    args = parser.parse_args()
    if args.tiny:
        parser.set_defaults(**TINY)
        args = parser.parse_args()
    if args.folder is None:
        args.folder = Path(tempfile.mkdtemp(prefix="lengths_"))
    args.rows = args.folder / "rows.jsonl"
    return args


class Lengths(Lines):
    """Runs cells and tries, keeps their lines, knows when the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.took: dict[str, float] = {}
        self.waiting: Child | None = None

    def prepare(self) -> None:
        """Write shape, tokenizer and, where a peer reads them from a disk, weights and ids."""
        self.emit(machine=qlora_gpu.machine())
        peers = "speed" in self.args.parts and any(side != "ours" for side in self.args.sides)
        self.emit(made=self.in_child("make", peers=peers))

    def speeds(self) -> None:
        """Measure every side at every length, the shorter ones first."""
        for length in self.args.lengths:
            for side in self.args.sides:
                if side.startswith("unsloth") and self.args.unsloth_site is None:
                    continue
                if self.left_s < self.took.get(side, 30.0):
                    self.emit(side=side, length=length, skipped=f"{self.left_s:.0f} s left")
                elif side == "ours":
                    self.emit(side=side, length=length, **self.in_child("cell", length=length))
                else:
                    self.emit(side=side, length=length, **self.peer(side, length))

    def peer(self, side: str, length: int) -> dict[str, Any]:
        """Run one peer at one length."""
        sizes = sizes_of(self.args, length)
        values = {**vars(self.args), **sizes, "rows": "", "gate_steps": 0, "gate_packs": 0}
        bench = Peers(argparse.Namespace(**{**values, "budget": self.left_s, "out": None}))
        started = time.monotonic()
        found = bench.run(side)
        self.took[side] = 1.5 * (time.monotonic() - started)
        return found

    def longest(self, cap: float) -> None:
        """Bisect for the longest context that trains under a cap of so many GiB."""
        unit, most = self.args.unit, self.args.most // self.args.unit
        plan = self.in_child("plan", cap=cap)
        length = min(most, max(1, plan.get("predicted", unit) // unit))
        trains, fails = 0, most + 1
        for _ in range(self.args.tries):
            grown = length * unit / max(unit, plan.get("predicted", 0))
            if self.left_s < BUILD_S + plan.get("predicted_step_s", 0.0) * max(1.0, grown) ** 2:
                self.emit(cap=cap, skipped=f"{self.left_s:.0f} s left")
                break
            found = self.in_child("try", cap=cap, length=length * unit)
            self.emit(cap=cap, length=length * unit, **found)
            if "trains" not in found:
                break
            trains, fails = (length, fails) if found["trains"] else (trains, length)
            if trains == most or (fails <= most and fails - trains <= max(1, trains // 16)):
                break
            above = min(most, max(length + 1, length * 5 // 4))
            length = above if fails > most else (trains + fails) // 2
        self.emit(cap=cap, longest=trains * unit, fails=fails * unit if fails <= most else None,
                  **plan)  # fmt: skip

    def in_child(self, what: str, **values: Any) -> dict[str, Any]:
        """Do something in a process of its own; return its line, or how it ended."""
        child = self.waiting or Child(self.args)
        self.waiting = Child(self.args) if self.left_s > 0 else None
        return child.ask({"what": what, **values}, max(30.0, self.left_s))


class Peers(qlora_gpu.Bench):
    """Runs a peer as benchmarks.qlora_gpu does; its line is another's to print."""

    def emit(self, **values: Any) -> dict[str, Any]:
        """Hand the line on."""
        return values


class Child:
    """A process that imports, and then does one thing."""

    def __init__(self, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(args, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, told: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Tell it what to do; return what it says."""
        found: dict[str, Any] = {"failed": "no time left"}
        try:
            self.pipe.send(told)
            if self.pipe.poll(seconds):
                found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            found = {"failed": self.process.exitcode}
        self.process.kill()
        self.process.join()
        return found


def child(args: argparse.Namespace, pipe: Connection) -> None:
    """Import without touching a GPU, wait for a word, do it and answer."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import raytune_ft.training.build  # noqa: F401
    from raytune_ft.errors import MemoryPlanError

    told = pipe.recv()
    ways = {"make": make, "cell": cell, "plan": plan, "try": attempt}
    try:
        pipe.send(ways[told.pop("what")](args, **told))
    except (torch.OutOfMemoryError, MemoryPlanError) as error:
        pipe.send({"trains": False, "refused": str(error).partition(".")[0]})
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[-400:]}"})


def sizes_of(args: argparse.Namespace, length: int) -> dict[str, Any]:
    """Return a cell's length, packs and steps."""
    short = length < args.long
    return {"length": length, "packs": max(1, args.step_tokens // length),
            "warm": int(short), "steps": 2 if short else 1}  # fmt: skip


def make(args: argparse.Namespace, *, peers: bool) -> dict[str, Any]:
    """Write what cells read: `shape/`; for peers random ids and the 4-bit weights that ours has."""
    import numpy as np
    from safetensors.numpy import save_file

    from benchmarks.made_model import write_chats

    args.folder.mkdir(parents=True, exist_ok=True)
    write_chats(args.rows, 200, 100)
    args.length = max([*args.lengths, args.most])  # as many positions
    shape = qlora_rows.shape_of(args)
    qlora_rows.write_tokenizer(args.folder / "shape", args.rows, min(4000, shape["vocab_size"]))
    text = json.dumps({**shape, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
                       "eos_token_id": 2, "pad_token_id": 0})  # fmt: skip
    (args.folder / "shape" / "config.json").write_text(text)
    if not peers:
        return {"positions": args.length}
    tokens = 2 * max(args.step_tokens, *args.lengths)
    ids = np.random.default_rng(7).integers(3, shape["vocab_size"], tokens, dtype=np.int32)
    documents = {"input_ids": ids, "labels": ids, "sizes": np.asarray([tokens], np.int32)}
    save_file(documents, args.folder / "documents.safetensors")
    args.packs = 1
    return {"positions": args.length, "weights": qlora_gpu.write_weights(args)}


class OneDocument(qlora_ours.Ours):
    """Ours, every pack of which is one document; its memory may be capped."""

    cap: float | None = None
    """GiB of the device that this process may take, whatever takes them."""

    def put_weights(self) -> None:
        """Make the model; then nothing may go beyond the cap."""
        super().put_weights()
        from raytune_ft.model import loading

        make_model = loading.load_model

        def made(*args: Any, **options: Any) -> Any:
            model = make_model(*args, **options)
            if self.cap is not None:
                hold(self.torch, self.cap)
            return model

        loading.load_model = made

    def data(self) -> Iterator[Any]:
        """Yield every optimizer step's data, for ever."""
        from raytune_ft.training.batching import steps

        return steps(self.documents(), self.room, rank=0, workers=1)

    def documents(self) -> Iterator[Any]:
        """Yield packs of random ids, each one document that is learned whole."""
        import numpy as np

        from raytune_ft.data.packing import Pack, Position
        from raytune_ft.data.places import Placed
        from raytune_ft.data.report import new_report

        length, number, rng = self.args.length, 0, np.random.default_rng(7)
        words = self.model.config.get_text_config().vocab_size
        bounds = np.asarray([0, length], np.int32)
        while True:
            number += 1
            ids = rng.integers(3, words, length, dtype=np.int32)
            positions = np.arange(length, dtype=np.int32)
            pack = Pack(ids, ids, positions, bounds, np.asarray([number]))
            yield Placed(pack, Position(0, 0, number), number * 1e-6, new_report())


def hold(torch: Any, cap: float) -> None:
    """Let torch's allocator have what a cap leaves beside what the device holds without it."""
    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((cap * GIB - beside) / total)
    torch.cuda.reset_peak_memory_stats()


def cell(args: argparse.Namespace, *, length: int) -> dict[str, Any]:
    """Measure ours at one length."""
    from statistics import median

    vars(args).update(sizes_of(args, length))
    ours = OneDocument(args, {})
    found = qlora_ours.timed(args, ours.step, ours.full_steps(), ours.torch)
    speed = {"tokens": ours.tokens, "tok_s": round(ours.tokens / median(found["step_s"]))}
    losses = {"losses": [round(loss, 4) for loss in ours.losses]}
    return {**speed, **found, **losses, **ours.line(), **predicted(ours)}


def predicted(ours: OneDocument) -> dict[str, Any]:
    """Return what the plan said of this layout: GiB, and tokens a second."""
    if ours.choice is None:
        return {}
    tokens = ours.args.length * ours.args.packs
    return {
        "predicted_gb": round(ours.choice.memory / GIB, 2),
        "predicted_tok_s": round(tokens / ours.choice.seconds),
        "layout": ours.choice.line,
    }


def plan(args: argparse.Namespace, *, cap: float) -> dict[str, Any]:
    """Return the longest context that the plan would allow under a cap."""
    from raytune_ft.config.estimates.layout import Choice, choose
    from raytune_ft.config.estimates.pace import DEVICES
    from raytune_ft.model.memory import Shape

    args.packs, room = 1, int(cap * GIB)
    shape = json.loads((args.folder / "shape" / "config.json").read_text())
    counted = Shape(shape)

    def chosen(units: int) -> Choice:
        args.length = units * args.unit
        recipe = qlora_rows.recipe_of(args, {})
        return choose(recipe, counted.counts(recipe), room, DEVICES["h200"])

    low, high = 0, args.most // args.unit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chosen(middle).memory <= room else (low, middle)
    step_s = chosen(max(1, low)).seconds
    return {"predicted": low * args.unit, "predicted_step_s": round(step_s, 1)}


def attempt(args: argparse.Namespace, *, cap: float, length: int) -> dict[str, Any]:
    """Take an optimizer step of one pack under a cap; OutOfMemoryError if it is too long."""
    import torch

    vars(args).update(sizes_of(args, length), packs=1)
    if not torch.cuda.is_available() and length > cap * TINY_HOLDS:
        raise torch.OutOfMemoryError("a rehearsal pretends that memory ends here")
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else cap * GIB
    OneDocument.cap = cap
    ours = OneDocument(args, {}, share=min(1.0, cap * GIB / total))
    started = time.perf_counter()
    ours.step(next(ours.full_steps()), 1)
    qlora_ours.wait(torch)
    took = {"seconds": round(time.perf_counter() - started, 2)}
    memory = qlora_ours.memory(torch) if torch.cuda.is_available() else {}
    return {"trains": True, **took, **memory, "recompute": ours.line()["recompute"],
            **predicted(ours)}  # fmt: skip


if __name__ == "__main__":
    main()
