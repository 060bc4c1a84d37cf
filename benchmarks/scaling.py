"""The same run on 1, 2, 4 and 8 GPUs: how fast, how much is sent, and is it the same run?

Random weights, made rows, everything through `raytune-ft train` and Ray Train as people run it:

    throughput  ZeRO-2 QLoRA of the InternLM-7B shape, the same tokens per GPU and step
    equal       gradients of 2, 4 and 8 ranks beside one GPU's (pytest tests/gpu/test_ranks.py)
    zero3       full training of a 1B shape, its memory beside one GPU's
    kill        kill -9 of a rank and a rank that stands still; the run goes on and ends the same
    gpu8        the shipped internlm_7b_qlora_moss_sft_all_e2_gpu8, 20 steps on MOSS-like rows
    each        throughput on all GPUs with gradients summed at every micro-step (DeepSpeed's own)

Pieces that do not time anything share the GPUs at the end. Prints a line of JSON as soon as one is
done, and a table; what has no time left is named.
Run: python -m benchmarks.scaling --folder DIR [--pieces throughput,equal,zero3,kill,gpu8,each]
     [--gpus 0,1,2,3] [--layers N] [--steps N] [--budget SECONDS] [--set key=value ...] [--out FILE]
     rehearsal without a GPU: --shrink 64 --layers 2 --length 64 --steps 3
     --accumulation 2
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import made_model, scaling_table
from benchmarks.scaling_pieces import Bench, equal, gpu8, kill, throughput, zero3
from benchmarks.scaling_runs import ROOT, environment

PIECES = ("throughput", "equal", "zero3", "kill", "gpu8", "each")
MOSS = (
    "moss-003-sft-no-tools.jsonl",
    "conversations_with_tools_with_inner_instruction_no_text2image_train_all_random_meta0.5_0.1_"
    "0.01_moss_0709.jsonl",
)
APART_S = 2.0
"""Between starts of what runs side by side: Rays that start at once may choose the same ports."""


def main() -> None:
    """Run the pieces and print the table."""
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.emit("machine", **machine(bench))
    for stage in stages(bench):
        beside(bench, stage)
    scaling_table.show(bench.results, sys.stdout)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pieces", default="throughput,equal,zero3,kill,gpu8")
    parser.add_argument("--gpus", type=_gpus, default=_all_gpus())
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--budget", type=float, default=530.0)
    parser.add_argument("--set", nargs="*", default=[], help="key=value for throughput and each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.pieces = args.pieces.split(",")
    if unknown := sorted(set(args.pieces) - set(PIECES)):
        parser.error(f"--pieces: {', '.join(unknown)}; choose from {', '.join(PIECES)}")
    return args


def _gpus(text: str) -> list[str]:
    return [one for one in text.split(",") if one]


def _all_gpus() -> list[str]:
    from raytune_ft.config.estimates import gpus

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _gpus(chosen) if chosen else [str(n) for n in range(len(gpus.visible()))]


def machine(bench: Bench) -> dict[str, Any]:
    """Name what this runs on."""
    from importlib import metadata

    from raytune_ft.config.estimates import gpus

    versions = {}
    for name in ("torch", "deepspeed", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"gpus": [one.name for one in gpus.visible()], "used": bench.gpus, **versions,
            "layers": bench.args.layers, "length": bench.length, "set": bench.args.set}  # fmt: skip


Lane = Callable[[], None]


def stages(bench: Bench) -> list[list[Lane]]:
    """Return what runs one after the other, each a list of what runs side by side."""
    wanted, found = bench.args.pieces, [[lambda: prepare(bench)]]
    timed: list[list[Lane]] = []
    if "throughput" in wanted:
        timed = [[lambda n=n: throughput(bench, n, 0)] for n in bench.worlds]  # type: ignore[misc]
    alone = len(bench.gpus) >= 4
    if "throughput" in wanted and alone:  # all but the largest have room at the same time
        small = bench.worlds[:-1]
        places = zip(small, itertools.accumulate(small, initial=0), strict=False)
        timed[:-1] = [[lambda n=n, at=at: throughput(bench, n, at) for n, at in places]]  # type: ignore[misc]
    if "zero3" in wanted:
        one: Lane = lambda: zero3(bench, 1, bench.most - 1 if alone else 0)  # noqa: E731
        if timed and alone:
            timed[0].append(one)
        else:
            timed.append([one])
    found += timed
    last: list[Lane] = []
    if "gpu8" in wanted:
        last.append(lambda: gpu8(bench))
    if "zero3" in wanted and bench.most > 1:
        last.append(lambda: zero3(bench, bench.most, 0))
    if "kill" in wanted:
        last.append(lambda: kill(bench))
    if "equal" in wanted:
        last.append(lambda: equal(bench))
    found += [last] if bench.on_gpu else [[lane] for lane in last]
    if "each" in wanted:
        found.append([lambda: throughput(bench, bench.most, 0, each=True)])
    return found


def beside(bench: Bench, lanes: list[Lane]) -> None:
    """Run lanes side by side; what one raises is told and ends that lane alone."""

    def guarded(number: int, lane: Lane) -> None:
        time.sleep(number * APART_S)
        try:
            lane()
        except Exception:
            bench.emit("failed", traceback=traceback.format_exc()[-1500:])

    if not lanes:
        return
    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(guarded, range(len(lanes)), lanes))


def prepare(bench: Bench) -> None:
    """Write models and rows, what is not there yet."""
    rows = bench.folder / "rows.jsonl"
    if not rows.exists():
        # a word is about one token: four rows make a pack
        packs = bench.args.steps * bench.args.accumulation * bench.most
        made_model.write_chats(rows, 5 * packs + 64, bench.length // 4)
        made_model.write_chats(bench.folder / "few.jsonl", 2000, bench.length // 4, distinct=8)
        (bench.folder / "data").mkdir()
        for name in MOSS:
            made_model.write_moss(bench.folder / "data" / name, 900, bench.length // 4)
    wanted = bench.args.pieces
    shapes = ["7b"] if {"throughput", "gpu8", "each"} & set(wanted) else []
    shapes += ["1b"] if "zero3" in wanted else []
    shapes += ["135m"] if "kill" in wanted else []
    beside(bench, [lambda s=s: make(bench, s) for s in shapes])  # type: ignore[misc]


def make(bench: Bench, shape: str) -> None:
    """Write a model in a process of its own, which gives the GPU's memory back."""
    if (bench.model(shape) / "model.safetensors.index.json").exists():
        return
    args = bench.args
    command = [sys.executable, "-m", "benchmarks.made_model", str(bench.model(shape)), "--shape",
               shape, "--shrink", str(args.shrink)]  # fmt: skip
    if shape == "7b" or args.shrink > 1:
        command += ["--layers", str(args.layers)]
    env = environment(bench.cut(0, 1))
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    made = done.stdout.strip().splitlines()[-1:] or ["{}"]
    bench.emit("made", shape=shape, **json.loads(made[0]), error=done.stderr[-800:]
               if done.returncode else None)  # fmt: skip


if __name__ == "__main__":
    main()
