"""One gradient, whatever splits, packs, shards or recomputes it.

The whole matrix is `pytest -m exact`; a part of it runs with all other tests.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.exact.bounds import Bounds
from tests.exact.cells import PACKINGS, SPLITS, WORLDS, Cell, matrix, part


@pytest.mark.exact
@pytest.mark.parametrize("cell", matrix(), ids=str)
def test_every_cell_has_the_gradient_of_samples_one_by_one(cell: Cell, bounds: Bounds) -> None:
    bounds.check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", part(), ids=str)
def test_a_part_of_the_matrix(cell: Cell, bounds: Bounds) -> None:
    bounds.check(cell)


def test_the_matrix_is_whole() -> None:
    """Every pair of values of two dimensions is in it, but for what cannot be."""
    cells = matrix()
    assert len(cells) == len(set(cells)) >= 240
    sharded = [cell for cell in cells if cell.dtype == "float32" and cell.stage]
    seen = Counter(
        (c.world, c.stage, c.micro, c.accumulation, c.packing, c.bucket) for c in sharded
    )
    assert len(seen) == len(WORLDS) * 3 * len(SPLITS) * len(PACKINGS) * 2
    for stage in (1, 2, 3):
        own = [cell for cell in sharded if cell.stage == stage]
        for name in ("checkpointing", "method", "order", "clipped"):
            for world in WORLDS:
                values = {getattr(c, name) for c in own if c.world == world}
                assert len(values) == len({getattr(c, name) for c in cells}), (stage, name)
