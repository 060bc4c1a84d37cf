"""The tables of docs/scaling.md, by arithmetic: networks, data stage, Ray's head, memory, failures.

What goes in is measured and named here; what comes out is predicted. No GPU and no Ray are needed.
Run: python -m benchmarks.scaling_model [--gpu h200]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.scaling_simulation import HOUR, Failing, goodput, run_with_failures, slowest
from raytune_ft.config import catalog
from raytune_ft.config.estimates import pace
from raytune_ft.config.estimates.footprint import Counts, count
from raytune_ft.config.estimates.links import FABRICS, efficiency
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.estimates.setting import Setting
from raytune_ft.config.estimates.traffic import (
    Exchange,
    calls,
    exchange,
    payloads,
    trained_of,
)
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.fitting import ASK_SECONDS

RANKS = (8, 64, 512)
RECIPE, FULL = "internlm_7b_qlora_oasst1_e3", "internlm_7b_full_oasst1_e3"
WAYS = (
    ("QLoRA as shipped", RECIPE, ()),
    ("QLoRA, stage 2 at each of 4 passes", RECIPE, ()),
    ("all weights, `zero1`", FULL, ("train.deepspeed=zero1",)),
    ("all weights, `zero2`", FULL, ("train.deepspeed=zero2",)),
    ("all weights, `zero3`", FULL, ("train.deepspeed=zero3",)),
)
AT_EACH_PASS = WAYS[1][0]
LAID = {
    RECIPE: ("train.micro_batch_size=4", "train.accumulation=4",
             "model.gradient_checkpointing=false"),
    FULL: ("train.micro_batch_size=4", "train.accumulation=4", "model.gradient_checkpointing=true"),
}  # fmt: skip
"""16 packs of 2,048 tokens a step; of the QLoRA as a GPU of 80 GiB and more lays it out."""
GIB, MB = 2**30, 1e6


@dataclass(frozen=True)
class Measured:
    """Rates of what does not get faster with more GPUs; `benchmarks.scaling_head` measures them."""

    made: float
    """Tokens per second and core that data tasks make packs of, through Ray (docs/benchmarks)."""
    walked: float
    """Tokens per second of CPU that a rank walks through, all ranks' packs."""
    token_bytes: float
    """Of a token in a window, which every node fetches once."""
    window_tokens: float
    mailbox: float
    """Calls per second."""
    feeder: float
    spread: float
    """Standard deviation of a rank's step times over their mean, at most: that of 16 steps on one
    H200, which changes common to all ranks are part of."""


MEASURED = Measured(
    made=2257 * 353 / 2, walked=29.8e6, token_bytes=8.03, window_tokens=433_000,
    mailbox=2995, feeder=1082, spread=0.008,
)  # fmt: skip
FAILING = Failing(gpu_s=54 * 24 * HOUR * 16_384 / 419, restart_s=174, save_s=2)
"""419 unexpected ends in 54 days on 16,384 H100 (Llama 3, 2024); our p95 to a new step on busy
machines (docs/reliability.md); an adapter's 1.9 GB by a disk of 1 GB/s."""


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", default="h200", choices=pace.DEVICES)
    args = parser.parse_args()
    for title, rows in tables(args.gpu):
        print(f"\n{title}\n", *rows, sep="\n")


def tables(gpu: str = "h200") -> Iterator[tuple[str, list[str]]]:
    """Yield titles and rows of Markdown."""
    yield "Networks", list(networks(gpu))
    yield "Data stage and head", list(singles(gpu))
    yield "Memory of a rank, GiB", list(memory())
    yield "Late ranks and failures", list(chances())


@cache
def case(name: str, overrides: tuple[str, ...], ranks: int) -> tuple[Recipe, Counts]:
    """Return a recipe for so many workers, with its model's counts."""
    model, _ = catalog.split(name)
    recipe = load_recipe(name, [*LAID[name], "train.optimizer=paged_adamw_32bit", *overrides,
                                f"run.workers={ranks}"])  # fmt: skip
    return recipe, count(catalog.card(model).config, recipe)


def work_of(name: str, overrides: tuple[str, ...], gpu: str) -> float:
    """Return the seconds of a step's passes and update, of a rank that waits for no other."""
    recipe, counts = case(name, overrides, 1)
    resident = recipe.model.quantization != "none"
    micro = pace.micro_seconds(recipe, counts, pace.DEVICES[gpu], resident=resident)
    update = pace.update_seconds(recipe, counts, pace.DEVICES[gpu])
    return recipe.train.accumulation * micro + update


def exchange_of(label: str, name: str, overrides: tuple[str, ...]) -> Exchange:
    """Return what ranks exchange in a step."""
    recipe, counts = case(name, overrides, RANKS[0])
    if label != AT_EACH_PASS:
        return exchange(recipe, counts)
    work = trained_of(Setting(recipe, counts, on_gpu=True))
    return Exchange(payloads(2, work), calls(2, work))


def networks(gpu: str) -> Iterator[str]:
    """Yield bytes, seconds and efficiency of every way and number of ranks over every network."""
    names = {"nvlink": "NVLink", "ib400": "IB 400G, 8 cards", "ib400-single": "IB 400G, 1 a GPU",
             "eth25": "25 GbE, 1 card for 8", "eth25-single": "25 GbE, 1 a GPU"}  # fmt: skip
    yield from _head("", "ranks", "work, s", "sent, GB", *names.values())
    for label, name, overrides in WAYS:
        work, found = work_of(name, overrides, gpu), exchange_of(label, name, overrides)
        for ranks in RANKS:
            shares = (f"{efficiency(work, found, ranks, FABRICS[key]):.1%}" for key in names)
            sent = f"{found.sent(ranks) / 1e9:.2f}"
            yield _row(label if ranks == RANKS[0] else "", ranks, f"{work:.2f}", sent, *shares)


def singles(gpu: str) -> Iterator[str]:
    """Yield what all ranks of the shipped QLoRA together ask of data tasks, disks and one actor."""
    recipe, _ = case(RECIPE, (), 1)
    tokens = recipe.global_batch_size * recipe.data.max_length
    each = tokens / work_of(RECIPE, (), gpu)
    yield from _head(
        "ranks", "tokens/s", "cores that tokenise", "windows to each node, MB/s",
        "a rank's walk through all packs, of its time", "feeder, calls/s", "of what it can",
        "mailbox, calls/s", "of what it can",
    )  # fmt: skip
    for ranks in RANKS:
        eaten = ranks * each
        asked = ranks * eaten / MEASURED.window_tokens
        asks = ranks / ASK_SECONDS
        yield _row(
            ranks, f"{eaten:,.0f}", f"{eaten / MEASURED.made:.1f}",
            f"{eaten * MEASURED.token_bytes / MB:.1f}", f"{eaten / MEASURED.walked:.1%}",
            f"{asked:,.1f}", f"{asked / MEASURED.feeder:.1%}", f"{asks:,.0f}",
            f"{asks / MEASURED.mailbox:.1%}",
        )  # fmt: skip


def memory() -> Iterator[str]:
    """Yield a rank's memory under every preset; the last column is what more ranks come to."""
    yield from _head("", "`train.deepspeed`", "1 rank", *(f"{ranks}" for ranks in RANKS))
    for label, name, presets in (
        ("QLoRA", RECIPE, ("none", "zero1", "zero2")),
        ("all weights", FULL, ("none", "zero1", "zero2", "zero3")),
    ):
        for zero in presets:
            sizes = (_memory(name, zero, ranks) for ranks in (1, *RANKS))
            yield _row(label, zero, *(f"{size / GIB:.1f}" for size in sizes))


def _memory(name: str, zero: str, ranks: int) -> int:
    recipe, counts = case(name, (f"train.deepspeed={zero}",), ranks)
    resident = recipe.model.quantization != "none"
    return sum(memory_bytes(recipe, counts, on_gpu=True, resident=resident).values())


def chances() -> Iterator[str]:
    """Yield what late ranks and failing GPUs leave of the time, drawn with seeds."""
    yield from _head(
        "ranks", "slowest rank over the mean, at most", "hours between failures",
        "best minutes between checkpoints", "time that is work", "by simulation", "every 500 steps",
    )  # fmt: skip
    often = 500 * work_of(RECIPE, (), "h200")
    for ranks in RANKS:
        best = FAILING.best_interval(ranks)
        drawn = run_with_failures(FAILING, ranks, best, segments=20_000)
        yield _row(
            ranks, f"{slowest(ranks, MEASURED.spread, steps=400):.3f}",
            f"{FAILING.between(ranks) / HOUR:,.0f}", f"{best / 60:.0f}",
            f"{goodput(FAILING, ranks, best):.2%}", f"{drawn:.2%}",
            f"{goodput(FAILING, ranks, often):.2%}",
        )  # fmt: skip


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


if __name__ == "__main__":
    main()
