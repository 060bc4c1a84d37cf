"""The bisection of benchmarks.lengths finds where memory ends, in few tries, and says if it did."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks.lengths import Lengths

UNIT = 1024


class Machine(Lengths):
    """Trains contexts up to a length; a plan that may be wrong."""

    def __init__(self, holds: int, predicted: int, **values: Any) -> None:
        told = {"unit": UNIT, "most": 256 * UNIT, "tries": 9, "budget": 1e6, "out": None, **values}
        super().__init__(argparse.Namespace(**told))
        self.holds, self.predicted = holds, predicted
        self.tried: list[int] = []

    def in_child(self, what: str, **values: Any) -> dict[str, Any]:
        if what == "plan":
            return {"predicted": self.predicted, "predicted_step_s": 10.0}
        self.tried.append(values["length"])
        return {"trains": values["length"] <= self.holds}


@pytest.mark.parametrize("predicted", [0, 7, 40, 100, 256])
@pytest.mark.parametrize("holds", [0, 1, 5, 37, 100, 255, 256, 300])
def test_the_longest_is_found(holds: int, predicted: int) -> None:
    machine = Machine(holds * UNIT, predicted * UNIT, tries=40)
    machine.longest(8.0)
    found = machine.lines[-1]
    assert found["longest"] <= holds * UNIT
    if holds >= 256:
        assert (found["longest"], found["fails"]) == (256 * UNIT, None)
    else:
        assert (
            holds * UNIT
            < found["fails"]
            <= found["longest"] + UNIT * max(1, found["longest"] // UNIT // 16)
        )
    assert len(set(machine.tried)) == len(machine.tried)


def test_no_try_begins_that_the_time_has_no_room_for() -> None:
    machine = Machine(100 * UNIT, 50 * UNIT, budget=45.0)
    machine.longest(8.0)
    assert machine.tried == []
    assert machine.lines[-1]["longest"] == 0 and "skipped" in machine.lines[-2]
