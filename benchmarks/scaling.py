"""The same run on 1, 2, 4 and 8 GPUs: how fast, how much is sent, and is it the same run?

Random weights, made rows, everything through `raytune-ft train` and Ray Train as people run it:

    throughput  ZeRO-2 QLoRA of the InternLM-7B shape, the same tokens per GPU and step
    equal       gradients of 2 and 4 ranks beside one GPU's (pytest tests/gpu/test_ranks.py)
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
import json
import math
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import made_model, scaling_kill, scaling_table
from benchmarks.scaling_runs import ROOT, Run, environment, figures

PIECES = ("throughput", "equal", "zero3", "kill", "gpu8", "each")
GPU8 = "internlm_7b_qlora_moss_sft_all_e2_gpu8"
MOSS = (
    "moss-003-sft-no-tools.jsonl",
    "conversations_with_tools_with_inner_instruction_no_text2image_train_all_random_meta0.5_0.1_"
    "0.01_moss_0709.jsonl",
)
KILL_STEPS, ZERO3_STEPS, GPU8_STEPS = 60, 12, 20
EVERY = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
QUIET = {"chat_eval": {"every": None, "prompts": []}}


class Bench:
    """What all pieces share: arguments, GPUs, the deadline, and a place for results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.folder.resolve()
        self.gpus: list[str] = args.gpus
        self.worlds = [n for n in (1, 2, 4, 8) if n <= len(self.gpus)] or [1, 2]
        self.deadline = time.monotonic() + args.budget
        self.length = args.length
        self.results: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def on_gpu(self) -> bool:
        """Whether there are GPUs; without them this is a rehearsal."""
        return bool(self.gpus)

    @property
    def most(self) -> int:
        """Ranks of the largest runs."""
        return self.worlds[-1]

    def cut(self, first: int, n: int) -> list[str]:
        """Return `n` GPUs from the one numbered `first` on; none without GPUs."""
        return self.gpus[first : first + n]

    def emit(self, piece: str, **values: Any) -> None:
        """Keep a result and print it."""
        line = {"piece": piece, **values}
        with self.lock:
            self.results.append(line)
            print(json.dumps(line, ensure_ascii=False), flush=True)
            if self.args.out is not None:
                with self.args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def model(self, shape: str) -> Path:
        """Return the folder of a model."""
        return self.folder / f"model_{shape}"


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

    return [str(number) for number in range(len(gpus.visible()))]


def machine(bench: Bench) -> dict[str, Any]:
    """Name what this runs on."""
    from importlib import metadata

    from raytune_ft.config.estimates import gpus

    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "ray")}
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
    if "throughput" in wanted and alone:  # one and two GPUs of the host at the same time
        timed[0:2] = [[lambda: throughput(bench, 1, 0), lambda: throughput(bench, 2, 1)]]
    if "zero3" in wanted:
        one: Lane = lambda: zero3(bench, 1, 3 if alone else 0)  # noqa: E731
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

    def guarded(lane: Lane) -> None:
        try:
            lane()
        except Exception:
            bench.emit("failed", traceback=traceback.format_exc()[-1500:])

    if not lanes:
        return
    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(guarded, lanes))


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


def left(bench: Bench, piece: str, needed: float, **what: Any) -> bool:
    """Tell whether a piece that takes so many seconds has the time; say so if not."""
    if bench.deadline - time.monotonic() >= needed or not bench.on_gpu:
        return True
    bench.emit(piece, skipped=f"{needed:.0f} s needed, not left", **what)
    return False


def body_7b(bench: Bench, workers: int) -> dict[str, Any]:
    """Return the shipped recipe of the 7B model with our model and rows, cut into full packs."""
    from raytune_ft.config import catalog

    body = catalog.body_for("internlm_7b", "qlora/oasst1_e3")
    body["model"]["path"] = str(bench.model("7b"))
    body["data"] |= {"sources": [{"path": str(bench.folder / "rows.jsonl")}],
                     "max_length": bench.length, "pack": "concat"}  # fmt: skip
    body["train"] |= {"epochs": 1, "max_steps": bench.args.steps, "log_every": 1,
                      "accumulation": bench.args.accumulation, "deepspeed": "zero2"}  # fmt: skip
    body["checkpoint"] = {"every": 1000, "keep": 1}
    body["run"] = {"workers": workers, "max_failures": 0, "trackers": []}
    return body | QUIET


def throughput(bench: Bench, n: int, first: int, *, each: bool = False) -> None:
    """Time steps of `n` ranks; the run is ended behind its last step, its saving is not timed."""
    piece = "each" if each else "throughput"
    if not left(bench, piece, 45.0, ranks=n):
        return
    body = body_7b(bench, n)
    if each:
        file = bench.folder / "every_micro_step.json"
        file.write_text(json.dumps(EVERY))
        body["train"]["deepspeed"] = str(file)
    run = Run(f"{piece}_{n}", bench.folder, body, bench.cut(first, n), tuple(bench.args.set))
    run.start()
    try:
        done = run.wait_until(lambda: run.step() >= bench.args.steps, bench.deadline)
        found = figures(run) | {"ended": "all steps" if done else run.words()}
        took = round(time.monotonic() - run.begun, 1)
        bench.emit(piece, ranks=n, wall_s=took, **found, **_model(bench, n, found, each))
    finally:
        run.end()


def _model(bench: Bench, n: int, found: dict[str, Any], each: bool) -> dict[str, Any]:
    """Return what docs/scaling.md predicts to be sent for a run's steps."""
    from benchmarks.traffic import Trained, payloads, sent_by_model
    from raytune_ft.config.estimates.footprint import count
    from raytune_ft.config.schema import Recipe

    if not found["steps"]:
        return {}
    recipe = Recipe.model_validate(body_7b(bench, n))
    shape = json.loads((bench.model("7b") / "config.json").read_text(encoding="utf-8"))
    width = 2 if bench.on_gpu else 4
    work = Trained(count(shape, recipe).trained, found["micro_steps"], width)
    ways = {"every micro-step": True, "once a step": False}
    predicted = {
        way: round(sent_by_model(payloads(2, work, every_micro_step=every), n))
        for way, every in ways.items()
    }
    return {"trained": work.trained, "sent_by_model": predicted,
            "asked_for": "every micro-step" if each else "as zero2 is here"}  # fmt: skip


def zero3(bench: Bench, n: int, first: int) -> None:
    """Train all weights of a 1B shape on the same few rows; with several ranks, to its end."""
    if not left(bench, "zero3", 45.0, ranks=n):
        return
    body = {
        "model": {"path": str(bench.model("1b")), "method": "full"},
        "data": {"sources": [{"path": str(bench.folder / "few.jsonl")}],
                 "max_length": bench.length, "pack": "concat"},
        "train": {"epochs": 1, "max_steps": ZERO3_STEPS, "micro_batch_size": 1, "accumulation": 2,
                  "lr": 1e-4, "scheduler": "constant", "deepspeed": "zero3", "log_every": 1},
        "checkpoint": {"every": 1000, "keep": 1},
        "run": {"workers": n, "max_failures": 0, "trackers": []}, **QUIET,
    }  # fmt: skip
    run = Run(f"zero3_{n}", bench.folder, body, bench.cut(first, n)).start()
    try:
        done = run.wait_until(lambda: run.step() >= ZERO3_STEPS, bench.deadline)
        found = figures(run)
        losses = [line["loss"] for line in run.lines("metrics.jsonl")]
        falls = bool(losses) and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
        code = run.wait(bench.deadline) if n > 1 and done else None
        ended = f"exit code {code}" if n > 1 else "ended behind its last step"
        bench.emit("zero3", ranks=n, finite_and_falling=falls, losses=[round(x, 3) for x in losses],
                   saved_and_exported=ended, words=None if done else run.words(),
                   wall_s=round(time.monotonic() - run.begun, 1), **found)  # fmt: skip
    finally:
        run.end()


def kill(bench: Bench) -> None:
    """Run a recipe twice on two ranks, disturb one of the runs, and compare."""
    if not left(bench, "kill", 60.0):
        return
    steps = KILL_STEPS if bench.on_gpu else 24
    body = {
        "model": {"path": str(bench.model("135m")), "quantization": "nf4"},
        "data": {"sources": [{"path": str(bench.folder / "rows.jsonl")}],
                 "max_length": bench.length},
        "train": {"epochs": 1, "max_steps": steps, "micro_batch_size": 2, "accumulation": 2,
                  "log_every": 1, "deepspeed": "zero2"},
        "checkpoint": {"every": 4, "keep": 2},
        "run": {"workers": 2, "max_failures": 4, "trackers": [], "collective_timeout": 12}, **QUIET,
    }  # fmt: skip
    module = "raytune_ft.train"
    pairs = bench.cut(0, 2), bench.cut(2 if len(bench.gpus) >= 4 else 0, 2)
    whole = Run("kill_whole", bench.folder, body, pairs[0], module=module).start()
    try:
        if not bench.on_gpu:
            whole.wait(bench.deadline)
        hurt = Run("kill_hurt", bench.folder, body, pairs[1], module=module).start()
        try:
            told = scaling_kill.disturb(hurt, 12, 1, bench.deadline)
            told["undisturbed_code"] = whole.wait(bench.deadline)
            words = None if told.get("code") == 0 else hurt.words()
            bench.emit("kill", **told, **scaling_kill.compare(hurt, whole), words=words,
                       wall_s=round(time.monotonic() - hurt.begun, 1))  # fmt: skip
        finally:
            hurt.end()
    finally:
        whole.end()


def gpu8(bench: Bench) -> None:
    """Run the shipped recipe of eight GPUs on as many as there are."""
    if not left(bench, "gpu8", 60.0):
        return
    n = bench.most
    changed = {
        "model.path": str(bench.model("7b")), "run.workers": str(n),
        "train.max_steps": str(GPU8_STEPS), "train.log_every": "1",
        "chat_eval.max_new_tokens": "8", "run.max_failures": "0", "run.trackers": "[]",
    }  # fmt: skip
    if not bench.on_gpu:
        changed |= {"data.max_length": str(bench.length), "train.micro_batch_size": "2"}
    overrides = tuple(f"{key}={value}" for key, value in changed.items())
    run = Run("gpu8", bench.folder, GPU8, bench.cut(0, n), overrides, cwd=bench.folder).start()
    try:
        code = run.wait(bench.deadline)
        bench.emit("gpu8", recipe=GPU8, ranks=n, asked_ranks=8, code=code,
                   changed=[one for one in overrides if not one.startswith("model.path")],
                   rows="made, in MOSS's format, under the recipe's own file names",
                   losses=[round(s["loss"], 3) for s in run.lines("metrics.jsonl")],
                   words=None if code == 0 else run.words(),
                   wall_s=round(time.monotonic() - run.begun, 1), **figures(run))  # fmt: skip
    finally:
        run.end()


def equal(bench: Bench) -> None:
    """Have pytest compare gradients of several ranks with one GPU's."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_ranks.py", "-s", "-x",
               "-p", "no:cacheprovider"]  # fmt: skip
    seconds = max(30.0, bench.deadline - time.monotonic())
    try:
        done = subprocess.run(
            command, env=environment(bench.gpus), cwd=ROOT, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        bench.emit("equal", code=None, words=str(late.stdout or "")[-1500:])
        return
    lines = [line for line in done.stdout.splitlines() if "gradient" in line and "off" in line]
    words = None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
    bench.emit("equal", code=done.returncode, lines=lines, words=words)


if __name__ == "__main__":
    main()
