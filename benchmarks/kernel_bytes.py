"""Bytes that adapters of a 7B's linear layers move beside the products with frozen weights.

    python -m benchmarks.kernel_bytes             # the table of docs/performance.md
    python -m benchmarks.kernel_bytes --tokens 2048 --rate 3.0

Counts, no measurement: what must leave or reach the memory if nothing stays in a cache, by group of
layers that share an input, and what that takes at a copy's rate. `read inside` is what a product
with a frozen weight reads of the sum it adds to, while it computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

HIDDEN, MLP, RANK, LAYERS = 4096, 11008, 64, 32
GROUPS = {
    "q, k, v": (HIDDEN, (HIDDEN,) * 3), "o": (HIDDEN, (HIDDEN,)),
    "gate, up": (HIDDEN, (MLP,) * 2), "down": (MLP, (HIDDEN,)),
}  # fmt: skip
"""Width of the input and widths of the outputs."""
TOKENS = 8192
RATE = 4.2
"""TB/s that a copy moves on an H200."""


@dataclass(frozen=True)
class Step:
    """One pass over memory, in bytes for each group of `GROUPS`."""

    name: str
    moved: tuple[int, ...]
    inside: bool = False
    """A large product reads it while it computes."""
    gone: bool = False
    """It was moved before 2026-11-26 and is not any more."""


def steps(tokens: int) -> Iterator[Step]:
    """Yield the passes of a forward and backward pass of one decoder layer."""
    inputs = [2 * tokens * width for width, _ in GROUPS.values()]
    outputs = [2 * tokens * sum(outs) for _, outs in GROUPS.values()]
    small = [2 * tokens * RANK * len(outs) for _, outs in GROUPS.values()]
    weights = [RANK * sum(width + out for out in outs) for width, outs in GROUPS.values()]
    later = [2 * tokens * width * (len(outs) - 1) for width, outs in GROUPS.values()]
    yield Step("forward: x, dropped and times A", tuple(inputs))
    yield Step("forward: inner times B written", tuple(outputs))
    yield Step("forward: the same read by x W", tuple(outputs), inside=True)
    yield Step("back: dy times B", tuple(outputs))
    yield Step("back: B's gradient, dy again", tuple(outputs))
    yield Step("back: A's gradient, x again", tuple(inputs))
    yield Step("back: dx of the adapters written", tuple(inputs))
    yield Step("back: dx of the frozen weights read, to be added to", tuple(inputs), gone=True)
    yield Step("back: dx read by the first dy W", tuple(inputs), inside=True)
    yield Step("back: dx read by further dy W", tuple(later), inside=True)
    # inner and its gradient: each written once, read twice
    yield Step("inner numbers, both ways", tuple(6 * one for one in small))
    # float32 read, bfloat16 written and read, twice; gradients written
    yield Step("A and B in bfloat16, twice; gradients", tuple(20 * one for one in weights))


def table(tokens: int, rate: float) -> str:
    """Return the table in Markdown: MB for each group, ms for all layers of the model."""
    lines = [("pass", *GROUPS, "all", f"ms of {LAYERS} layers"), ("---",) * (len(GROUPS) + 3)]
    rows = list(steps(tokens))
    for step in rows:
        note = ", no more" if step.gone else ", inside" if step.inside else ""
        lines.append((step.name + note, *_row(step.moved, rate)))
    for name, chosen in (
        ("exposed before", [s for s in rows if not s.inside]),
        ("exposed now", [s for s in rows if not (s.inside or s.gone)]),
        ("read inside large products", [s for s in rows if s.inside]),
    ):
        sums = tuple(sum(column) for column in zip(*(s.moved for s in chosen), strict=True))
        lines.append((f"**{name}**", *_row(sums, rate)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(moved: tuple[int, ...], rate: float) -> Iterator[str]:
    for size in (*moved, sum(moved)):
        yield f"{size / 1e6:.0f}"
    yield f"{LAYERS * sum(moved) / rate / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rate", type=float, default=RATE, help="TB/s")
    given = parser.parse_args()
    print(table(given.tokens, given.rate), end="")


if __name__ == "__main__":
    main()
