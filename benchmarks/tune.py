"""What do k trials cost on one shared base, beside trials that have a base each?

The same trials, rows and steps three ways, every process anew from its start to its adapters: one
trial after the other, with the whole machine each; all at once in processes of their own, as `tune`
runs them on a CPU; and all in one process on one base (`training.together`). Trials per hour count
the whole process, and again the steps alone: a start is paid once where the base is shared, while
products cost the same. Losses are compared trial by trial. A line of JSON for each process, then a
table.

Model: the cached SmolLM2-135M (`model.default_model`), or `--made 7b|1b|135m`: random weights of
that shape, made on the device, quantised to NF4 if it is a GPU, as the 7B recipes ship it.
Run: python -m benchmarks.tune [--trials K] [--steps N] [--length L] [--packs P] [--budget SECONDS]
     [--device cpu|cuda] [--made SHAPE [--layers N] [--shrink N]] [--out FILE];  ... --table FILE
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import made_model
from benchmarks.lines import Lines

ROOT = Path(__file__).resolve().parent.parent
RANKS, RATES = (64, 32, 16, 8), (2e-4, 4e-4, 1e-4, 8e-4)
GIB = 2**30
SHARED = "shared"


def main() -> None:
    """Prepare, run every way, print the table."""
    args = arguments()
    if args.table is not None:
        print_table([json.loads(line) for line in args.table.read_text().splitlines()])
    elif args.one is not None:
        print(json.dumps(one(args)), flush=True)
    else:
        bench(args)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a trial")
    parser.add_argument("--length", type=int, help="tokens of a pack; 256, on a GPU 2048")
    parser.add_argument("--packs", type=int, help="of a step; 2, on a GPU 16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--made", choices=made_model.SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--quantization", choices=("none", "nf4"))
    parser.add_argument("--at-once", type=int, help="adapters in a pass; as many as fit")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of all together")
    parser.add_argument("--folder", type=Path, help="for what is made; a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of an --out file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--sharing", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.length = args.length or (2048 if on_gpu else 256)
    args.packs = args.packs or (16 if on_gpu else 2)
    if args.quantization is None:
        args.quantization = "nf4" if on_gpu and args.made else "none"
    if args.folder is None:
        args.folder = Path(tempfile.mkdtemp(prefix="bench_tune_"))
    return args


def recipe_of(args: argparse.Namespace, number: int) -> Any:
    """Return a trial's recipe: another rank and learning rate, the same rows."""
    from raytune_ft.config.schema import Recipe

    rank = RANKS[number % len(RANKS)]
    model = str(args.folder / "shape")
    return Recipe.model_validate({
        "model": {"path": model, "quantization": args.quantization},
        "lora": {"r": rank, "alpha": 16, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(args.folder / "rows.jsonl")}], "max_length": args.length,
        },
        "train": {
            "lr": RATES[number % len(RATES)], "accumulation": args.packs, "max_steps": args.steps,
            "epochs": 1000, "optimizer": "paged_adamw_32bit" if args.device == "cuda" else "adamw",
        },
        "checkpoint": {"every": 10**6},
        "chat_eval": {"every": None},
        "run": {"trackers": []},
    })  # fmt: skip


def prepare(args: argparse.Namespace) -> None:
    """Write the rows and the model's folder, or a link to it."""
    args.folder.mkdir(parents=True, exist_ok=True)
    made_model.write_chats(args.folder / "rows.jsonl", 400, args.length // 6)
    shape = args.folder / "shape"
    if args.made is None:
        from raytune_ft.model import default_model

        if not shape.exists():
            shape.symlink_to(default_model.ensure(print))
        return
    from transformers import LlamaConfig

    shape.mkdir(exist_ok=True)
    made_model.write_tokenizer(shape)
    LlamaConfig(
        **made_model.shape_of(args.made, args.layers, args.shrink), max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(shape)  # fmt: skip


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Train what `--one` names, in this process: a trial by its number, or all on one base."""
    import torch

    from benchmarks.qlora_ours import put_random_weights
    from benchmarks.qlora_rows import packs_of
    from raytune_ft.training import worker
    from raytune_ft.training.together import run_together

    numbers = list(range(args.trials)) if args.one == SHARED else [int(args.one)]
    recipes = [recipe_of(args, number) for number in numbers]
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if args.made is not None:
        put_random_weights(args, recipes[0], device)
    said: list[tuple[int, float, float]] = []

    def told(place: int, event: dict[str, Any]) -> bool:
        if event["kind"] == "step":
            said.append((numbers[place], event["loss"], time.monotonic()))
        return True

    jobs = [_job(args, recipe, n) for n, recipe in zip(numbers, recipes, strict=True)]
    packs = packs_of(recipes[0])
    if args.one == SHARED:
        found = run_together(jobs, packs, None, told, at_once=args.at_once)
        if not all(outcome.is_done for outcome in found):
            raise SystemExit(str([outcome.error for outcome in found]))
    else:
        worker.run(jobs[0], packs, None, functools.partial(_heard, told))
    return {"variant": args.one, **_figures(said, numbers, device, torch)}


def _heard(told: Callable[[int, dict[str, Any]], bool], event: dict[str, Any]) -> None:
    told(0, event)


def _job(args: argparse.Namespace, recipe: Any, number: int) -> Any:
    from raytune_ft.training.run_folder import write_json
    from raytune_ft.training.worker import Job

    run = args.folder / f"{args.one}_{args.sharing}" / str(number)
    run.mkdir(parents=True)
    write_json(run / "data.json", {"rows": 1, "used": 1, "formats": ["openai"], "steps": 1})
    content = recipe.model_dump(mode="json")
    return Job(
        content, str(run), recipe.model.path, args.steps,
        sharing=args.sharing, gpu_share=1 / args.sharing,
    )  # fmt: skip


def _figures(
    said: list[tuple[int, float, float]], numbers: list[int], device: Any, torch: Any
) -> dict[str, Any]:
    """Return seconds of a step of all trials here, the peak of memory, and losses by trial."""
    ends = [at for number, _, at in said if number == numbers[-1]]
    gaps = [after - before for before, after in pairwise(ends)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        device_gb = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
    else:
        peak, device_gb = used.ru_maxrss * 1024, None
    losses = {str(n): [loss for number, loss, _ in said if number == n] for n in numbers}
    return {
        "step_s": round(median(gaps), 3), "peak_gib": round(peak / GIB, 2),
        "reserved_gib": device_gb, "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "losses": losses,
    }  # fmt: skip


class Bench(Lines):
    """Starts processes, keeps their lines, and knows when the time is over."""

    def run(self, way: str, names: list[str]) -> float | None:
        """Run processes at once, to their ends; return the seconds, None if one failed."""
        started = time.monotonic()
        running = [(name, self._start(name, len(names))) for name in names]
        fine = True
        for name, process in running:
            try:
                said, words = process.communicate(timeout=max(1.0, self.left_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                said, words = "", "no time left"
            found = [line for line in said.splitlines() if line.startswith("{")]
            if process.returncode == 0 and found:
                self.emit(way=way, **json.loads(found[-1]))
            else:
                fine = False
                self.emit(way=way, variant=name, failed=words.strip()[-600:])
        return time.monotonic() - started if fine else None

    def _start(self, name: str, at_once: int) -> subprocess.Popen[str]:
        args = self.args
        words = [sys.executable, "-m", "benchmarks.tune", "--one", name, "--sharing", at_once]
        for field in ("trials", "steps", "length", "packs", "device", "shrink", "quantization",
                      "folder", "made", "layers", "at_once"):  # fmt: skip
            value = getattr(args, field)
            words += [] if value is None else [f"--{field.replace('_', '-')}", value]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                       "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip
        if args.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def bench(args: argparse.Namespace) -> None:
    """Run every way, a line each, and print the table."""
    prepare(args)
    runs = Bench(args)
    load = os.getloadavg()[0]
    runs.emit(trials=args.trials, steps=args.steps, packs=args.packs, length=args.length,
              model=args.made or "SmolLM2-135M", quantization=args.quantization,
              device=args.device, cores=os.cpu_count(), load=round(load, 1))  # fmt: skip
    names = [str(number) for number in range(args.trials)]
    shared = runs.run(SHARED, [SHARED])
    _sum_up(runs, args, SHARED, shared)
    apart = [runs.run("one by one", [name]) for name in names]
    whole = None if None in apart else sum(seconds or 0.0 for seconds in apart)
    _sum_up(runs, args, "one by one", whole)
    _sum_up(runs, args, "at once", runs.run("at once", names))
    print_table(runs.lines)


def _sum_up(runs: Bench, args: argparse.Namespace, way: str, seconds: float | None) -> None:
    """Keep a line for a way to run all trials."""
    if seconds is None:
        runs.emit(summary=way, failed=True)
        return
    lines = [line for line in runs.lines if line.get("way") == way and "step_s" in line]
    peaks = [line["peak_gib"] for line in lines]
    steps = [line["step_s"] for line in lines]
    together = way == "at once"
    runs.emit(
        summary=way, seconds=round(seconds, 1),
        trials_per_hour=round(3600 * args.trials / seconds, 1),
        # of all trials: one process takes a step of each, or processes take theirs
        step_s=round(max(steps) if together else sum(steps), 3),
        peak_gib=round(sum(peaks) if together else max(peaks), 2),
        cpu_s=round(sum(line["cpu_s"] for line in lines), 1),  # load of others does not change it
    )  # fmt: skip


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print as Markdown what every way took, and by how much losses differ."""
    ways = {line["summary"]: line for line in lines if "summary" in line and "seconds" in line}
    base = ways.get("one by one")
    heads = ("way", "all trials s", "trials/hour", "ratio", "a step of all s", "ratio", "CPU s",
             "ratio", "peak GiB", "ratio")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, line in ways.items():
        cells = [name, f"{line['seconds']:.1f}"]
        for key, is_rate in (
            ("trials_per_hour", True),
            ("step_s", False),
            ("cpu_s", False),
            ("peak_gib", True),
        ):
            own, other = line[key], base[key] if base else None
            ratio = "" if not other else f"{own / other if is_rate else other / own:.2f}"
            cells += [str(own), ratio]
        print(f"| {' | '.join(cells)} |")
    for line in lines:
        if "failed" in line:
            print(f"failed: {line.get('summary') or line.get('variant')}: {line['failed']}")
    if (gap := _largest_gap(lines)) is not None:
        print(f"losses of {SHARED} and one by one differ by at most {gap:.1e}")


def _largest_gap(lines: list[dict[str, Any]]) -> float | None:
    shared: dict[str, list[float]] = {}
    for line in lines:
        if line.get("variant") == SHARED:
            shared = line.get("losses", {})
    gaps = [
        abs(mine - theirs)
        for line in lines
        if line.get("way") == "one by one" and "losses" in line
        for number, losses in line["losses"].items()
        for mine, theirs in zip(shared.get(number, []), losses, strict=False)
    ]
    return max(gaps, default=None)


if __name__ == "__main__":
    main()
