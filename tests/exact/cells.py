"""The cells of the gradient equality matrix, and the samples that all of them train on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from raytune_ft.data.encode import IGNORE_INDEX, Example

WORDS = 61
MAX_LENGTH = 24
SPLITS = ((1, 4), (2, 2), (4, 1))
WORLDS = (1, 2, 4)
PACKINGS = ("best_fit", "concat", "none")
BUCKETS = {"tiny": 256, "large": 1_000_000}
"""Elements: fewer than most of the tensors have, and more than all have together."""


@dataclass(frozen=True)
class Cell:
    """One way to compute the same gradient."""

    world: int
    """Ranks, gloo processes."""
    stage: int
    """0: nothing is sharded, the plain torch engine."""
    dtype: str
    micro: int
    accumulation: int
    packing: str
    checkpointing: bool
    bucket: str
    order: int
    """Seed of the order of the packs."""
    method: str
    clipped: bool = False
    """Whether `max_norm` is below the gradient's norm."""

    def __str__(self) -> str:
        values = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]
        return " ".join(values)


def matrix() -> list[Cell]:
    """Return every cell, in an order that visits each number of ranks once."""
    found = dict.fromkeys([*_plain(), *_sharded(), *_halves()])
    return sorted(found, key=lambda cell: cell.world)


def part() -> list[Cell]:
    """Return the cells that run with all other tests: on one rank, and on two."""
    cells = matrix()
    alone = [c for c in cells if c.world == 1 and c.dtype != "bfloat16"]
    two = [c for c in cells if c.world == 2 and c.stage > 0]
    halves = [c for c in cells if c.world == 2 and c.dtype == "bfloat16" and c.stage in (0, 2)]
    return [*alone[:: len(alone) // 4], *two[:: len(two) // 5], *halves[:2]]


def _plain() -> Iterator[Cell]:
    ways = itertools.product(WORLDS, ("float64", "float32"), SPLITS, PACKINGS, (False, True))
    for number, (world, dtype, split, packing, again) in enumerate(ways):
        yield Cell(world, 0, dtype, *split, packing, again, "large", *_others(number))


def _sharded() -> Iterator[Cell]:
    ways = itertools.product(WORLDS, (1, 2, 3), SPLITS, PACKINGS, BUCKETS)
    for number, (world, stage, split, packing, bucket) in enumerate(ways):
        again = (number // 2) % 2 == 1
        yield Cell(world, stage, "float32", *split, packing, again, bucket, *_others(number))


def _halves() -> Iterator[Cell]:
    ways = itertools.product(WORLDS, ("lora", "full"), SPLITS, (0, 1, 2, 3), BUCKETS)
    for world, method, split, stage, bucket in ways:
        if stage or bucket == "large":
            yield Cell(
                world, stage, "bfloat16", *split, "best_fit", split == (2, 2), bucket, 1, method
            )


def _others(number: int) -> tuple[int, str, bool]:
    """Vary what is left evenly over the cells."""
    return number % 3, ("lora", "full")[number % 2], number % 5 == 0


def samples(packing: str) -> list[Example]:
    """Return ragged samples; unpacked, ten of them are three windows of 4, 4 and 2."""
    random = np.random.default_rng(7)
    found = []
    for _ in range(10 if packing == "none" else 24):
        length = int(random.integers(3, 15))
        ids = random.integers(1, WORDS, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(random.integers(0, length - 1))] = IGNORE_INDEX
        found.append(Example(ids, labels, length))
    return found
