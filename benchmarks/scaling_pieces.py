"""The pieces of the scaling benchmark: GPUs in, a line of JSON for each run out.

`scaling` says what each is about, and when it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import scaling_kill
from benchmarks.scaling_runs import ROOT, Run, environment, figures

GPU8 = "internlm_7b_qlora_moss_sft_all_e2_gpu8"
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
    from raytune_ft.config.estimates.footprint import count
    from raytune_ft.config.estimates.traffic import Trained, payloads, sent_by_model
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


def as_written() -> dict[str, str]:
    """Return what keeps runs that share GPUs from taking all the memory that is free."""
    from raytune_ft.config.schema import TrainSection

    return {"layout": "recipe"} if "layout" in TrainSection.model_fields else {}


def zero3(bench: Bench, n: int, first: int) -> None:
    """Train all weights of a 1B shape on the same few rows; with several ranks, to its end."""
    if not left(bench, "zero3", 45.0, ranks=n):
        return
    body = {
        "model": {"path": str(bench.model("1b")), "method": "full"},
        "data": {"sources": [{"path": str(bench.folder / "few.jsonl")}],
                 "max_length": bench.length, "pack": "concat"},
        "train": {"epochs": 1, "max_steps": ZERO3_STEPS, "micro_batch_size": 1, "accumulation": 2,
                  "lr": 1e-4, "scheduler": "constant", "deepspeed": "zero3", "log_every": 1,
                  **as_written()},
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
        "train": {"epochs": 99, "max_steps": steps, "micro_batch_size": 2, "accumulation": 2,
                  "log_every": 1, "deepspeed": "zero2", **as_written()},
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
    changed |= {f"train.{key}": value for key, value in as_written().items()}
    if not bench.on_gpu:
        changed |= {"data.max_length": str(max(256, bench.length)), "train.micro_batch_size": "2"}
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
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_ranks.py", "-s", "--maxfail=3",
               "-m", "gpu or exact", "-p", "no:cacheprovider"]  # fmt: skip
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
