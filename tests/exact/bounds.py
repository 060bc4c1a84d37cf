"""Bounds: how far a cell may be from the oracle.

float64 and float32 may differ in the order of sums alone. bfloat16 has rounding of its own, and a
sharded cell may not be further off than the cell without shards on the same batches.
"""

from __future__ import annotations

from dataclasses import replace

from tests.exact.cells import Cell
from tests.exact.groups import Groups
from tests.exact.runner import Outcome

LIMITS = {"float64": 1e-10, "float32": 1e-5}
SPREAD, SPREAD_OF_STAGE_3 = 1.05, 1.5
"""Shards add up the same bfloat16 gradients in another order, in float32. Stage 3 has linear
layers of its own, which round in other places."""
STEP_LIMIT = 1e-4
"""Of a step's length; float32 weights around 1 keep 1e-5 of a step of 0.01."""


class Bounds:
    """Run cells and judge their outcomes."""

    def __init__(self, groups: Groups, results: dict[Cell, Outcome]) -> None:
        self.groups = groups
        self.results = results

    def outcome(self, cell: Cell) -> Outcome:
        """Run a cell, once."""
        if cell not in self.results:
            self.results[cell] = self.groups.run(cell)
        return self.results[cell]

    def check(self, cell: Cell) -> None:
        """Fail if a cell is too far from the oracle."""
        found = self.outcome(cell)
        limit = LIMITS.get(cell.dtype)
        if limit is None:
            plain = self.outcome(replace(cell, stage=0, bucket="large"))
            assert plain.gradient < 0.1, f"bfloat16 without shards is {plain.gradient:.1e} off"
            limit = (SPREAD_OF_STAGE_3 if cell.stage == 3 else SPREAD) * plain.gradient
        else:
            assert found.norm <= limit, f"{cell}: norm is {found.norm:.1e} off"
        assert found.gradient <= limit, f"{cell}: {found.gradient:.1e} over {limit:.1e}"
        assert found.step <= STEP_LIMIT, f"{cell}: weights are {found.step:.1e} off AdamW's"
