"""What does `model.compute: fp8` cost a real model in held-out loss?

The same adapter is trained with frozen weights as they are and in float8, with the same seeds: a
seed decides the adapter's beginning, the order of rows and dropout. One worker's training stack,
without Ray. Held-out rows are measured with the base's own weights on both sides, as runs do it:
an adapter is used with these. Three seeds tell a spread poorly, so every figure is printed, with
the differences seed by seed. On a CPU float8 is emulated, rounding for rounding.

Rows are a file of one's own; of a folder's two files, one is held out. A line of JSON for each run
goes to --out, and runs that stand there are not run again.
Run: python -m benchmarks.fp8_gap --rows chats.jsonl --held-out others.jsonl [--out FILE]
     on a GPU: --quantization nf4 --steps 60 --packs 8 --micro 8 --length 1024 --r 64 --lr 5e-4 \
         --dropout 0.1 --held-out-packs 40
     python -m benchmarks.fp8_gap --table FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SIDES = ("auto", "fp8")


def main() -> None:
    """Train what is missing, print the table."""
    args = arguments()
    if args.table is None:
        for line in measured(args):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    print(table(known(args.table or args.out)))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", help="file of chat rows")
    parser.add_argument("--held-out", help="file of rows that are only measured")
    parser.add_argument("--held-out-packs", type=int, default=24, help="at most so many of them")
    parser.add_argument("--template", default="tokenizer")
    parser.add_argument("--quantization", default="none", choices=["none", "nf4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--packs", type=int, default=2, help="of an optimizer step")
    parser.add_argument("--micro", type=int, default=1, help="packs of a forward pass")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="slow on a CPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sharing", type=int, default=1, help="processes that share the cores")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("fp8_gap.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of an --out file")
    args = parser.parse_args()
    if args.table is None and not (args.rows and args.held_out):
        parser.error("--rows and --held-out are needed")
    if args.device == "cpu":
        import os

        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the worker takes a GPU where torch sees one
    return args


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a line for each run that has none yet, and one of the model before training."""
    from raytune_ft.model import loading

    folder = loading.prepare_folder(args.model, log=print)
    done = {(line["compute"], line["seed"]) for line in known(args.out)}
    for seed in args.seeds:
        for compute in SIDES:
            if (compute, seed) not in done:
                recipe = recipe_of(args, folder, compute, seed)
                with tempfile.TemporaryDirectory(prefix="fp8_gap_") as place:
                    run_folder = Path(place, f"{compute}-{seed}")
                    yield run(recipe, folder, run_folder, args.held_out_packs, args.sharing)
                gc.collect()


def recipe_of(args: argparse.Namespace, folder: Path, compute: str, seed: int) -> Any:
    """Return a run's recipe; both sides go the fast path, so float8 is all that differs."""
    from raytune_ft.config.schema import Recipe

    model = {"path": str(folder), "template": args.template, "quantization": args.quantization}
    return Recipe.model_validate({
        "model": {
            **model, "fast_path": True, "compute": compute, "gradient_checkpointing": False,
        },
        "lora": {"r": args.r, "alpha": args.r, "dropout": args.dropout},
        "data": {
            "sources": [{"path": str(Path(args.rows).resolve())}], "max_length": args.length,
            "validation": str(Path(args.held_out).resolve()),
        },
        "train": {
            "epochs": 100, "max_steps": args.steps, "micro_batch_size": args.micro,
            "accumulation": args.packs // args.micro, "lr": args.lr,
            "warmup_steps": max(1, args.steps // 10), "seed": seed, "deepspeed": "none",
            "layout": "recipe",
        },
        "eval": {"every": 10**6},
        "checkpoint": {"every": 10**6, "keep": 1},
        "chat_eval": {"every": None, "prompts": []},
        "run": {"trackers": []},
    })  # fmt: skip


def run(recipe: Any, folder: Path, place: Path, most: int, sharing: int) -> dict[str, Any]:
    """Train once; return its losses, in training and of held-out rows."""
    import torch

    from raytune_ft.training import worker
    from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl, write_json

    packs, held_out = rows_of(recipe, most)
    kept, begun = RunFolder(place), time.perf_counter()
    place.mkdir()
    write_json(place / "run.json", {"name": place.name, "status": "running"})
    write_json(place / "data.json", {"rows": 1, "used": 1, "formats": [], "steps": 1})
    steps = recipe.train.max_steps
    job = worker.Job(
        recipe.model_dump(mode="json"), str(place), str(folder), steps, sure=True, sharing=sharing
    )
    worker.run(job, packs, lambda: held_out, lambda _event: None)
    seconds = time.perf_counter() - begun
    lines = list(read_jsonl(kept.metrics))
    losses = [line["loss"] for line in lines]
    return {
        "compute": recipe.model.compute, "seed": recipe.train.seed,
        "quantization": recipe.model.quantization,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "steps": len(lines), "tokens": sum(line["tokens"] for line in lines),
        "held_out_tokens": sum(int((pack.labels >= 0).sum()) for pack in held_out),
        "seconds": round(seconds, 1), "first_loss": losses[0], "last_losses": losses[-4:],
        "val_loss": lines[-1]["val_loss"],
        "val_loss_before": None if recipe.model.compute == "fp8" else before(
            recipe, folder, held_out
        ),
        "fast_path": read_json(kept.run_json).get("fast_path"),
    }  # fmt: skip


def before(recipe: Any, folder: Path, held_out: list[Any]) -> float:
    """Measure held-out rows before training."""
    import torch

    from raytune_ft.training.build import build_engine
    from raytune_ft.training.evaluating.validation import held_out_figures

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine, _ = build_engine(recipe, folder, device)
    return held_out_figures(engine, held_out, recipe.data.max_length)["val_loss"]


def rows_of(recipe: Any, most: int) -> tuple[Any, list[Any]]:
    """Return a worker's stream of packs, and held-out packs, as a run through Ray has them."""
    from itertools import islice

    from raytune_ft.data import sources
    from raytune_ft.data.examples import Encoder
    from raytune_ft.data.packing import Position
    from raytune_ft.data.places import iter_packs
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.data.windows import make_feed

    encoder = Encoder.of(recipe, TextTokenizer.from_folder(recipe.model.path))
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    training, held_out = sources.split_validation(rows, recipe.data, recipe.train.seed)
    feed = make_feed(training, encoder, recipe.train.seed)
    # the same held-out packs for every seed
    measured_feed = make_feed(held_out, encoder, 0)
    packs = islice(iter_packs(measured_feed, Position(), epochs=1), most)
    return lambda at: iter_packs(feed, at, epochs=recipe.train.epochs), [one.pack for one in packs]


def known(file: Path) -> list[dict[str, Any]]:
    """Return the lines that a file has."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Return every figure as Markdown, and what follows from seeds that both sides have."""
    by = {(line["compute"], line["seed"]): line for line in lines}
    seeds = sorted({seed for _, seed in by if all((side, seed) in by for side in SIDES)})
    rows = ["| seed | before | own weights | float8 | difference |",
            "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for seed in seeds:
        own, eight = (by[side, seed]["val_loss"] for side in SIDES)
        first = by["auto", seed]["val_loss_before"]
        rows.append(f"| {seed} | {first:.4f} | {own:.4f} | {eight:.4f} | {eight - own:+.4f} |")
    return "\n".join([*rows, *verdicts(by, seeds)])


def verdicts(by: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> Iterator[str]:
    """Yield means, the spread of the seeds, and whether float8 lies inside it."""
    if len(seeds) < 2:
        return
    own, eight = ([by[side, seed]["val_loss"] for seed in seeds] for side in SIDES)
    for name, found in (("own weights", own), ("float8", eight)):
        yield (
            f"{name}: {mean(found):.4f}, from {min(found):.4f} to {max(found):.4f}, standard "
            f"deviation {stdev(found):.4f}"
        )
    apart = [b - a for a, b in zip(own, eight, strict=True)]
    inside = [min(own) <= value <= max(own) for value in (mean(eight), *eight)]
    error = stdev(apart) / len(apart) ** 0.5
    yield (
        f"float8 seed by seed {mean(apart):+.4f}, standard error {error:.4f}; its mean lies "
        f"{'inside' if inside[0] else 'outside'} the seeds' spread of {max(own) - min(own):.4f}, "
        f"and so do {sum(inside[1:])} of {len(eight)} runs"
    )


if __name__ == "__main__":
    main()
