"""How long until the first optimizer step, the first time and the second?

A 7B folder of random weights is written, 14.6 GB, and `raytune_ft.train` begins a QLoRA on it as
people run it, with Ray, data tasks and ZeRO-2: first with an empty cache folder, when weights are
read and quantised and the NF4 store is written, then again, when they come from the store, and a
third time with the store off. Each run ends behind its first step. Parts are the stages that a run
prints, by its own clock: what is waited for, since Ray starts while the driver imports, and workers
while it reads. Beside them stand the seconds of CPU of all processes, which a busy machine does not
stretch, and how many processes there are. Asking sample prompts is left out, since how long answers
are is the recipe's choice. Files written a moment ago lie in the page cache for all runs; with
--cold they are asked to leave it before each.
Run: python -m benchmarks.start --folder DIR [--runs first,second,off] [--cold] [--layers N]
     [--budget SECONDS] [--out FILE];  rehearsal without a GPU: --shrink 64 --layers 2 --length 64
Prints a line of JSON for each start, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import made_model
from benchmarks.scaling_runs import POLL_S, ROOT, Run, environment

STAGE = re.compile(r"\[\s*([\d.]+) s\] (.+)")
STARTS = ("first", "second", "off")
ROWS, WORDS = 4000, 200
PACKS = 16
LIMIT = "RAYTUNE_MODEL_CACHE_GIB"


def main() -> None:
    """Write the folder, start runs, print lines and the table."""
    args = arguments()
    deadline = time.monotonic() + args.budget
    args.folder.mkdir(parents=True, exist_ok=True)
    emit(args, **made(args))
    lines = []
    for name in args.runs:
        if args.cold:
            leave_page_cache(args.folder)
        lines.append(emit(args, **measured(args, name, deadline)))
    print_table(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", default=",".join(STARTS))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--gpu", default="0", help="its number; empty: none")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs, args.folder = args.runs.split(","), args.folder.resolve()
    return args


def emit(args: argparse.Namespace, **line: Any) -> dict[str, Any]:
    """Print a line and keep it."""
    print(json.dumps(line), flush=True)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


def made(args: argparse.Namespace) -> dict[str, Any]:
    """Write the model, if it is not there, in a process of its own, and the rows."""
    begun = time.perf_counter()
    words = [sys.executable, "-m", "benchmarks.made_model", str(args.folder / "model"),
             "--shrink", str(args.shrink)]  # fmt: skip
    words += ["--layers", str(args.layers)] if args.layers else []
    gpus = [args.gpu] if args.gpu else []
    if not (args.folder / "model" / "model.safetensors.index.json").is_file():
        subprocess.run(words, check=True, env=environment(gpus), cwd=ROOT, stdout=subprocess.PIPE)
    made_model.write_chats(args.folder / "rows.jsonl", ROWS, WORDS, distinct=500)
    size = sum(file.stat().st_size for file in (args.folder / "model").glob("*.safetensors"))
    return {"made_gb": round(size / 1e9, 2), "seconds": round(time.perf_counter() - begun, 1)}


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the shipped recipe on the made model and rows, one step long."""
    from raytune_ft.config import catalog

    body = catalog.body_for("internlm_7b", "qlora/oasst1_e3")
    body["model"] |= {"path": str(args.folder / "model"), "template": "tokenizer"}
    body["data"] |= {
        "sources": [{"path": str(args.folder / "rows.jsonl")}],
        "max_length": args.length,
    }
    body["train"] |= {"max_steps": 1, "accumulation": PACKS if args.gpu else 2}
    return body | {
        "chat_eval": {"every": None, "prompts": []},
        "checkpoint": {"every": 10**6},
        "run": {"trackers": []},
    }


def measured(args: argparse.Namespace, name: str, deadline: float) -> dict[str, Any]:
    """Start a run, wait for its first step, end it; return seconds of its parts."""
    if name == "first":
        shutil.rmtree(args.folder / "cache", ignore_errors=True)
    os.environ["RAYTUNE_CACHE"] = str(args.folder / "cache")
    os.environ.pop(LIMIT, None)
    if name == "off":
        os.environ[LIMIT] = "0"
    shutil.rmtree(args.folder / "runs" / name, ignore_errors=True)
    run = Run(
        name,
        args.folder,
        recipe_of(args),
        [args.gpu] if args.gpu else [],
        module="raytune_ft.train",
    ).start()
    stages, offset = list[tuple[float, str]](), float("inf")
    try:
        while run.step() < 1 and run.process.poll() is None and time.monotonic() < deadline:
            stages = [(float(s), words.strip()) for s, words in STAGE.findall(run.log.read_text())]
            if stages:  # a run's own clock begins behind its first imports
                offset = min(offset, time.monotonic() - run.begun - stages[-1][0])
            time.sleep(POLL_S)
        total = time.monotonic() - run.begun
        cpu_s, processes = run.spent()
        if run.step() < 1:
            return {"start": name, "failed": run.process.poll(), "words": run.words()}
    finally:
        run.end()
    (step,) = run.lines("metrics.jsonl")[:1]
    return {
        "start": name,
        "to_first_step_s": round(total, 1),
        "parts": parts_of(stages, offset, total, step["seconds"]),
        "cpu_s": round(cpu_s, 1),
        "processes": processes,
        "step_tokens": step["tokens"],
        "loss": step["loss"],
        "store_gb": round(_size(args.folder / "cache" / "nf4") / 1e9, 2),
        "warnings": [line for line in run.words().splitlines() if "model cache" in line],
    }


def parts_of(
    stages: list[tuple[float, str]], offset: float, total: float, step_s: float
) -> dict[str, float]:
    """Return seconds of each stage: from its line to the next one's, the first step last."""
    marks = [(0.0, "first imports"), *((offset + at, name) for at, name in stages)]
    ends = [at for at, _ in marks[1:]] + [total - step_s]
    parts: dict[str, float] = {}
    for (at, name), end in zip(marks, ends, strict=True):
        parts[name] = round(parts.get(name, 0.0) + end - at, 1)
    return {**parts, "first step": round(step_s, 1)}


def leave_page_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of the files."""
    for file in [*folder.rglob("*.safetensors")]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print seconds by part and start as Markdown."""
    names = list(dict.fromkeys(part for line in lines for part in line.get("parts", {})))
    last = ["to the first step", "CPU s", "processes"]
    print("| start |", " | ".join([*names, *last]), "|")
    print("|", " | ".join("---" for _ in range(len(names) + len(last) + 1)), "|")
    for line in lines:
        cells = [str(line.get("parts", {}).get(name, "")) for name in names]
        total = line.get("to_first_step_s", f"failed: {line.get('failed')}")
        spent = [str(line.get(name, "")) for name in ("cpu_s", "processes")]
        print(f"| {line['start']} |", " | ".join([*cells, str(total), *spent]), "|")


if __name__ == "__main__":
    main()
