"""What of a run goes through one process, and how much of it: the limits of many ranks.

    mailbox   calls per second of the actor that every rank asks whether to stop, and events put
    feeder    calls per second of the actor that hands out windows, each answered at once
    reading   tokens per second of one sequence that a rank can walk through, all ranks' packs

The first two are Ray actors on this machine, asked by as many processes as it has cores; the last
is one process without Ray. Rates are per second of the CPU time of that one process, which is what
it can do with a core of its own, so that other work on the machine does not count; `wall` is what
came about meanwhile. Prints a line of JSON.
Run: python -m benchmarks.scaling_head [--seconds 5] [--rows 4000] [--max-length 2048]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import made_model
from raytune_ft.cluster import ray_session
from raytune_ft.config.schema import Recipe

READERS, AT_ONCE = 64, 100
"""Ranks that the feeder counts on; calls that a caller has on their way."""


def main() -> None:
    """Measure all and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--max-length", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scaling_head_") as place:
        recipe = write(Path(place), args)
        found = {"cores": os.cpu_count(), "load": os.getloadavg()[0], **reading(recipe, args)}
        with ray_session():
            found |= {**mailbox(args.seconds), **feeder(recipe, args.seconds)}
    print(json.dumps({name: _short(value) for name, value in found.items()}))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(folder: Path, args: argparse.Namespace) -> Recipe:
    """Write rows of a few hundred tokens and a tokenizer."""
    made_model.write_tokenizer(folder)
    made_model.write_chats(folder / "rows.jsonl", args.rows, 350)
    return Recipe.model_validate({
        "model": {"path": str(folder)},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}], "max_length": args.max_length},
        "train": {"micro_batch_size": 1, "accumulation": 16},
    })  # fmt: skip


def feed_of(recipe: Recipe) -> Any:
    """Open the rows as a run does."""
    from raytune_ft.data import sources
    from raytune_ft.data.examples import Encoder
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.data.windows import make_feed

    source = sources.open_sources(recipe.data, recipe.train.seed)
    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    return make_feed(source, Encoder.of(recipe, tokenizer), recipe.train.seed)


def reading(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Time what a rank does with packs of all ranks: windows read, targets counted, places kept."""
    from raytune_ft.data.packing import Position
    from raytune_ft.data.places import placed
    from raytune_ft.data.stream import read_window, window_table
    from raytune_ft.training.batching import steps

    feed = feed_of(recipe)
    began = time.process_time()
    tables = [window_table(feed, 0, number) for number in range(feed.n_windows)]
    making = time.process_time() - began
    size, tokens, walked = sum(table.nbytes for table in tables), 0, 0.0
    while walked < args.seconds:
        began = time.process_time()
        made = ((0, n, read_window(table)) for n, table in enumerate(tables))
        packs = placed(made, Position(), feed.n_windows)
        tokens += sum(s.n_tokens for s in steps(packs, recipe.train, rank=0, workers=READERS))
        walked += time.process_time() - began
    own = sum(len(pack.input_ids) for n, t in enumerate(tables) for pack in read_window(t).packs)
    return {
        "tokens_per_window": own / feed.n_windows, "bytes_per_token": size / own,
        "made_tokens_per_s": own / making, "walked_tokens_per_s": tokens / walked,
    }  # fmt: skip


def rates(name: str, actor: str, ask: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Return the calls that all callers get answered, per second of the actor's CPU and in all.

    Args:
        name: of the figures.
        actor: its class.
        ask: calls it.
        seconds: to go on for.
    """
    import ray

    @ray.remote(num_cpus=0)
    def call(ask: Callable[[], Any]) -> int:
        done, ends = 0, time.monotonic() + seconds
        while time.monotonic() < ends:
            ray.get([ask() for _ in range(AT_ONCE)])
            done += AT_ONCE
        return done

    ray.get([ask() for _ in range(AT_ONCE)])
    used, began = cpu_of(actor), time.monotonic()
    done = sum(ray.get([call.remote(ask) for _ in range(os.cpu_count() or 1)]))
    used, took = cpu_of(actor) - used, time.monotonic() - began
    return {f"{name}_per_s": done / used, f"{name}_per_s_wall": done / took}


def cpu_of(actor: str) -> float:
    """Return the seconds of CPU that an actor's process, one of ours, has used."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith(f"ray::{actor}"):
                times = process.cpu_times()
                return float(times.user + times.system)
    raise RuntimeError(f"no process of {actor}")


def mailbox(seconds: float) -> dict[str, float]:
    """Time the mailbox."""
    import ray

    from raytune_ft.mailbox import Mailbox

    actor = ray.remote(num_cpus=0)(Mailbox).remote()
    event = {"kind": "step", "step": 1, "loss": 1.5, "rows": list(range(64))}
    asked = rates("mailbox_calls", "Mailbox", actor.stopping.remote, seconds)
    return asked | rates("mailbox_events", "Mailbox", partial(actor.put.remote, event), seconds)


def feeder(recipe: Recipe, seconds: float) -> dict[str, float]:
    """Time the feeder, with a window that is there."""
    import ray

    from raytune_ft.data.feeder import Rows, feeding

    with feeding({"train": Rows(feed_of(recipe))}, readers=READERS, begin=("train",)) as supply:
        ask = partial(supply.actor.window.remote, "train", 0, 0)
        while not ray.get(ask())[0]:
            pass
        return rates("feeder_calls", "Feeder", ask, seconds)


if __name__ == "__main__":
    main()
