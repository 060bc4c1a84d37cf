"""What does `data.cache` save?

Makes chat rows and every window of two epochs: without a cache, while it is filled (epoch 0), from
it in a later epoch (rows come from everywhere), and from it in another run (epoch 0 again).
Run: python -m benchmarks.data_cache TOKENIZER_FOLDER [--rows 8192] [--words 400]
Prints one JSON line: rows per second of one process, read to packed.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, make_feed

TEXT = (
    "river stone cloud night green song glass seven window order epoch token row pack light water "
    "house paper street garden number letter answer question morning evening mountain forest"
)
WORDS = TEXT.split()
SEED = 1


def main() -> None:
    """Measure once and print the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--words", type=int, default=400, help="of a row")
    args = parser.parse_args()
    tokenizer = TextTokenizer.from_folder(args.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        make_rows(path, args.rows, args.words)
        found = measure(path, tokenizer, Path(name) / "cache")
    print(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), **found}))


def measure(path: Path, tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """Return rows per second of each way over all rows of a file, and what the cache takes.

    Args:
        path: rows.
        tokenizer: makes their tokens.
        folder: an empty cache folder for the time being.
    """
    with cache_folder(folder):
        plain, kept = feed(path, tokenizer, cache=False), feed(path, tokenizer, cache=True)
        plain.window(0, 0)  # the tokenizer's own caches are warm for all ways
        tokenised, tokens = rate(plain, 1)
        filling, _ = rate(kept, 0)
        later, same = rate(kept, 1)
        other_run, _ = rate(feed(path, tokenizer, cache=True), 0)
    if tokens != same:
        raise SystemExit(f"other tokens from the cache: {same}, not {tokens}")
    size = sum(one.stat().st_size for one in folder.glob("tokens/*/*.arrow"))
    return {
        "rows": plain.order.n_rows,
        "tokens_per_row": round(tokens / plain.order.n_rows),
        "tokenised_rows_per_s": round(tokenised),
        "filling_rows_per_s": round(filling),
        "later_epoch_rows_per_s": round(later),
        "other_run_rows_per_s": round(other_run),
        "later_epoch_speedup": round(later / tokenised, 1),
        "bytes_per_token": round(size / tokens, 2),
    }


def feed(path: Path, tokenizer: TextTokenizer, *, cache: bool) -> Feed:
    """Bind the rows of a file to a recipe's defaults."""
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "cache": cache})
    return make_feed(open_sources(data, SEED), Encoder(tokenizer, "tokenizer", data), SEED)


def rate(windows: Feed, epoch: int) -> tuple[float, int]:
    """Make all windows of an epoch; return rows per second and tokens."""
    start, tokens = time.perf_counter(), 0
    for number in range(windows.n_windows):
        tokens += windows.window(epoch, number).report["tokens"]
    return windows.order.n_rows / (time.perf_counter() - start), tokens


def make_rows(path: Path, n_rows: int, n_words: int) -> None:
    """Write chats of about so many words."""
    draw = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(n_rows):
            words = draw.choices(WORDS, k=draw.randint(n_words // 2, n_words * 3 // 2))
            row = {
                "instruction": f"{number} " + " ".join(words[::2]),
                "output": " ".join(words[1::2]),
            }
            file.write(json.dumps(row) + "\n")


@contextmanager
def cache_folder(folder: Path) -> Iterator[None]:
    """Use another cache folder for a while."""
    before = os.environ.get("RAYTUNE_CACHE")
    os.environ["RAYTUNE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAYTUNE_CACHE"]
        else:
            os.environ["RAYTUNE_CACHE"] = before


if __name__ == "__main__":
    main()
