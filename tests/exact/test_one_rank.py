"""Cells of one rank, in this process: what a planted bug is found by within seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.exact import bounds, runner
from tests.exact.cells import Cell
from tests.exact.runner import Outcome

RAGGED = Cell(1, 0, "float64", 1, 4, "none", False, "large", 0, "lora")
PADDED = replace(RAGGED, micro=2, accumulation=2, packing="best_fit", method="full", clipped=True)
CELLS = (
    RAGGED, PADDED, replace(RAGGED, method="full", checkpointing=True, packing="concat"),
    *(replace(RAGGED, stage=stage, dtype="float32", bucket="tiny") for stage in (1, 2, 3)),
    *(replace(PADDED, stage=stage, dtype="float32", checkpointing=True) for stage in (2, 3)),
)  # fmt: skip


def outcome(cell: Cell, folder: Path) -> Outcome:
    found = runner.run(cell, folder, lambda: None)
    assert found is not None
    return found


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.dtype}-{c.stage}-{c.method}-{c.packing}")
def test_a_cell_has_the_gradient_of_samples_one_by_one(cell: Cell, tmp_path: Path) -> None:
    found = outcome(cell, tmp_path)
    assert found.gradient <= bounds.LIMITS[cell.dtype]
    assert found.norm <= bounds.LIMITS[cell.dtype]
    assert found.step <= bounds.STEP_LIMIT


def test_shards_lose_no_more_than_bfloat16_does(tmp_path: Path) -> None:
    plain = replace(RAGGED, dtype="bfloat16", packing="best_fit")
    whole, sharded = (outcome(replace(plain, stage=s), tmp_path) for s in (0, 2))
    assert sharded.gradient <= bounds.SPREAD * whole.gradient
