"""How long does a run wait for its first batch, at the beginning and in the middle?

Makes a JSONL file of chats and measures, on a consumer that reads through Ray as a rank does: from
the start of the data stage to the first batch and to the first optimizer step of a tiny random
model, then from the start of the data stage to the first batch of runs that go on at 1%, 50% and
99% of the rows, with the rows that were tokenised until then. Ray's own start is apart.
Run: python -m benchmarks.data_resume [--rows 1000000] [--row-bytes 500] [--folder DIR]
Prints a table for docs/benchmarks.md. The folder needs room for the file; all is removed.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import random
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data_memory import WORDS, make_tokenizer
from raytune_ft.cluster import ray_session
from raytune_ft.config.schema import Recipe
from raytune_ft.data.examples import Encoder
from raytune_ft.data.feeder import Rows, feeding
from raytune_ft.data.packing import Position
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.preparation import prepare
from raytune_ft.screen import Screen
from raytune_ft.training import worker
from raytune_ft.training.run_folder import Event, RunFolder

SHARES = (0.01, 0.5, 0.99)


def main() -> None:
    """Make the file, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row-bytes", type=int, default=500)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["RAYTUNE_CACHE"] = str(folder / "cache")  # nothing is known of the file
        make_model(folder / "model")
        make_rows(folder / "rows.jsonl", args.rows, args.row_bytes)
        begun = time.perf_counter()
        with ray_session():
            started = time.perf_counter() - begun
            lines = [*first_step(folder), *(going_on(folder, share) for share in SHARES)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    size = f"{args.rows:,} rows of about {args.row_bytes} bytes"
    print(
        f"{size}; {os.cpu_count()} cores, {platform.machine()}; start of Ray {started:.1f} s apart"
    )
    print(f"commit {commit}, {datetime.date.today()}\n")
    print("| from the start of the data stage | s | rows tokenised by then |\n| --- | --- | --- |")
    for what, seconds, rows in lines:
        print(f"| {what} | {seconds:.1f} | {rows} |")


def first_step(folder: Path) -> list[tuple[str, float, str]]:
    """Prepare a run as `train` does and take one optimizer step in this process."""
    recipe = recipe_of(folder)
    run = RunFolder(folder / "runs/first")
    run.path.mkdir(parents=True)
    stepped: list[float] = []

    def show(event: Event) -> None:
        if event["kind"] == "step":
            stepped.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    prepared = prepare(recipe, run, "benchmark", Screen(1, console=Console(file=io.StringIO())))
    with feeding(prepared.kinds, begin=["train"]) as supply:
        packs, _ = supply.of_rank(0)
        stream = packs(Position())
        next(stream)
        batch = time.perf_counter() - begun
        stream.close()  # type: ignore[attr-defined]
        made = supply.state("train")["made"] + len(prepared.train.made)
        worker.run(replace(prepared.job, sharing=1), packs, None, show)
    rows = f"{made * recipe.data.window:,}"
    return [
        ("first batch, file never seen before", batch, rows),
        ("first optimizer step, model loaded after that batch", stepped[0], ""),
    ]


def going_on(folder: Path, share: float) -> tuple[str, float, str]:
    """Open the rows anew and read the first batch behind a share of them."""
    recipe = recipe_of(folder)
    begun = time.perf_counter()
    tokenizer = TextTokenizer.from_folder(folder / "model")
    source = open_sources(recipe.data, recipe.train.seed)
    feed = make_feed(source, Encoder(tokenizer, "default", recipe.data), recipe.train.seed)
    window = int(share * feed.n_windows)
    with feeding({"train": Rows(feed)}) as supply:
        packs = supply.packs("train", Position(0, window, 1))
        next(packs)
        seconds = time.perf_counter() - begun
        state = supply.state("train")
        packs.close()  # type: ignore[attr-defined]
    seen = [*state["kept"], *state["on their way"]]
    earlier = sum(number < window for number in seen)
    text = f"{state['made'] * recipe.data.window:,}, of earlier windows {earlier}"
    return f"first batch at {share:.0%} (window {window:,} of {feed.n_windows:,})", seconds, text


def recipe_of(folder: Path) -> Recipe:
    """Return a recipe of one step over the file."""
    return Recipe.model_validate({
        "model": {"path": str(folder / "model"), "template": "default", "quantization": "none"},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}], "max_length": 2048},
        "train": {"epochs": 1, "max_steps": 1, "accumulation": 1, "deepspeed": "none"},
        "chat_eval": {"every": None},
        "run": {"name": "first", "storage": str(folder / "runs"), "trackers": []},
    })  # fmt: skip


def make_model(folder: Path) -> None:
    """Write a random Llama of 2 layers, width 64, and a tokenizer."""
    make_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 8, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(path: Path, rows: int, row_bytes: int) -> None:
    """Write chats of about `row_bytes` bytes, no two alike."""
    random.seed(0)
    words = max(4, (row_bytes - 110) // 7)
    texts = [" ".join(random.choices(WORDS, k=random.randint(1, 2 * words))) for _ in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            question = {"role": "user", "content": f"{row}: {WORDS[row % len(WORDS)]}?"}
            answer = {"role": "assistant", "content": f"{row} {texts[row % 1000]}"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


if __name__ == "__main__":
    main()
