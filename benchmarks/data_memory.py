"""Does memory grow with the data?

Makes files of chat rows of several sizes, opens each as a run does, and makes windows of the first
rows, of those in the middle and of the last, in a process of their own as a data task is.
Run: python -m benchmarks.data_memory [--sizes 0.1 1 10] [--parquet 1] [--windows 4] [--folder DIR]
Prints a table for docs/benchmarks.md. The folder needs room for the largest file; all is removed.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, make_feed

POOL_ROWS = 20_000
GROUP_BYTES = 256 * 2**20
"""Of a row group of the Parquet file; writers make them of up to some hundred megabytes."""
TEXT = (
    "river stone cloud night green song glass seven window order epoch token row pack light water "
    "house paper street garden number letter answer question morning evening mountain forest"
)
WORDS = TEXT.split()


@dataclass(frozen=True)
class Opened:
    """What a driver needs of a file: seconds, megabytes, rows."""

    first_s: float
    again_s: float
    peak_mb: float
    shipped_mb: float
    rows: int


@dataclass(frozen=True)
class Made:
    """What a data task needs for its windows: megabytes, megabytes of rows per second."""

    peak_mb: float
    mb_per_s: float


def main() -> None:
    """Measure all files and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.1, 1, 10], help="GB of JSONL")
    parser.add_argument("--parquet", type=float, default=1, help="GB of Parquet, 0 for none")
    parser.add_argument("--windows", type=int, default=4, help="made from each of three places")
    parser.add_argument("--folder", type=Path, default=None, help="for the files made")
    args = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores {platform.machine()}, "
          f"`python -m benchmarks.data_memory {' '.join(sys.argv[1:])}`\n")  # fmt: skip
    print("| file | rows | opened first, s | that is, MB/s | opened again, s | driver's peak, MB "
          "| shipped to a task, MB | data task's peak, MB | rows to packs, MB/s |")  # fmt: skip
    print("|" + " --- |" * 9)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["RAYTUNE_CACHE"] = str(folder / "cache")
        make_tokenizer(folder / "tokenizer")
        pool = chats()
        for size in args.sizes:
            row(folder, f"rows-{size:g}-gb.jsonl", size, args.windows, pool)
        if args.parquet:
            row(folder, f"rows-{args.parquet:g}-gb.parquet", args.parquet, args.windows, pool)


def row(folder: Path, name: str, size_gb: float, windows: int, pool: list[Any]) -> None:
    """Make a file, measure it, print its row of the table, and remove it."""
    path = folder / name
    write = write_parquet if path.suffix == ".parquet" else write_jsonl
    write(path, int(size_gb * 1e9), pool)
    opened: Opened = apart(open_twice, folder, path)
    feed = feed_of(folder, path)
    made: Made = apart(make_windows, feed, path.stat().st_size, windows)
    rate = f"{path.stat().st_size / 1e6 / opened.first_s:,.0f}"
    if path.suffix == ".parquet":
        rate = "–"  # its footer is read, not its rows
    print(
        f"| {size_gb:g} GB {path.suffix[1:]} | {opened.rows:,} | {opened.first_s:.2f} "
        f"| {rate} | {opened.again_s:.3f} | {opened.peak_mb:.0f} | {opened.shipped_mb:.2f} "
        f"| {made.peak_mb:.0f} | {made.mb_per_s:.1f} |",
        flush=True,
    )
    path.unlink()


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process, and return what it returns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, work, args))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _send(to: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    to.send(work(*args))


def feed_of(folder: Path, path: Path) -> Feed:
    """Open a file as a run does."""
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "max_length": 2048})
    tokenizer = TextTokenizer.from_folder(folder / "tokenizer")
    return make_feed(open_sources(data, 1), Encoder(tokenizer, "default", data), 1)


def open_twice(folder: Path, path: Path) -> Opened:
    """Measure what a driver does before the first window."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        feed = feed_of(folder, path)
        times.append(time.perf_counter() - start)
    shipped = len(pickle.dumps(feed.source)) / 1e6
    return Opened(times[0], times[1], peak_mb(), shipped, len(feed.source))


def make_windows(feed: Feed, size_bytes: int, windows: int) -> Made:
    """Measure packs of the first windows, of some in the middle and of the last."""
    rows, start = 0, time.perf_counter()
    for first in {0, feed.n_windows // 2, max(0, feed.n_windows - windows)}:
        stop = min(first + windows, feed.n_windows)
        for placed in iter_packs(feed, Position(0, first, 0), epochs=1):
            if placed.behind.window >= stop:
                break
        rows += (stop - first) * feed.order.window
    seconds = time.perf_counter() - start
    return Made(peak_mb(), rows * size_bytes / feed.order.n_rows / 1e6 / seconds)


def peak_mb() -> float:
    """Return the most memory that this process ever had, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # not what its parent had when it was forked, as getrusage may tell
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def chats() -> list[dict[str, Any]]:
    """Make rows of 2 KB on average, most of them short, some of 20 KB."""
    draw = random.Random(1)
    return [
        {"messages": [
            {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))},
            {"role": "assistant",
             "content": " ".join(draw.choices(WORDS, k=int(draw.paretovariate(1.2) * 60) % 3500))},
        ]}
        for _ in range(POOL_ROWS)
    ]  # fmt: skip


def write_jsonl(path: Path, size_bytes: int, pool: list[Any]) -> None:
    """Write rows of the pool in random order until the file is so large."""
    lines = [json.dumps(row).encode() + b"\n" for row in pool]
    draw = random.Random(2)
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            file.write(b"".join(draw.choices(lines, k=10_000)))


def write_parquet(path: Path, size_bytes: int, pool: list[Any]) -> None:
    """Write row groups of GROUP_BYTES until the file is so large."""
    table = pa.Table.from_pylist(pool)
    draw = random.Random(2)
    per_group = int(len(table) * GROUP_BYTES / table.nbytes)
    with parquet.ParquetWriter(path, table.schema, use_dictionary=False, compression="none") as to:
        while path.stat().st_size < size_bytes:
            to.write_table(table.take(draw.choices(range(len(table)), k=per_group)), per_group)


def make_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the words that the rows are made of."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "</s>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _texts() -> Iterator[str]:
    draw = random.Random(3)
    for _ in range(100):
        yield " ".join(draw.choices(WORDS, k=50))


if __name__ == "__main__":
    main()
