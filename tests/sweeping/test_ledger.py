"""A ledger read again knows what the one knew that wrote it, wherever its writer was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.sweeping.trials import Ledger, name_of, ranked


def written(folder: Path) -> Ledger:
    ledger = Ledger.read(folder)
    ledger.planned([{"lora.r": n} for n in range(5)])
    ledger.started(0)
    ledger.rung(0, 2, 3.5)
    ledger.started(1)
    ledger.ended("failed", 1, metric=None, step=0, reason="loss is nan")
    ledger.ended("done", 0, metric=1.5, step=8, seconds=2.0)
    ledger.started(2)
    ledger.rung(2, 2, 4.5)
    ledger.ended("stopped", 2, metric=4.5, step=2)
    ledger.started(3)
    return ledger


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    assert Ledger.read(tmp_path) == ledger
    assert [t.state for t in ledger.trials.values()] == [
        "done", "failed: loss is nan", "stopped early", "running", "waiting",
    ]  # fmt: skip
    assert ledger.over == [1, 0, 2]
    assert ledger.rungs == [(0, 2, 3.5), (2, 2, 4.5)]
    assert [t.number for t in ledger.waiting()] == [3, 4]
    assert ledger.trials[3].folder == tmp_path / "trials" / name_of(3)


def test_a_line_that_a_crash_cut_short_never_happened(tmp_path: Path) -> None:
    whole = written(tmp_path)
    content = (tmp_path / "trials.jsonl").read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last + 1, len(content)):
        (tmp_path / "trials.jsonl").write_bytes(content[:end])
        ledger = Ledger.read(tmp_path)
        assert ledger.trials[3].state == "waiting"
        ledger.started(3)
        again = Ledger.read(tmp_path)
        assert again == ledger
        assert again.trials == whole.trials


def test_what_is_over_stays_so(tmp_path: Path) -> None:
    ledger = written(tmp_path)
    ledger.ended("failed", 0, metric=None, step=9, reason="late")
    assert ledger.trials[0].state == "done"
    assert ledger.over == [1, 0, 2]


@pytest.mark.parametrize(("mode", "first"), [("min", 3), ("max", 0)])
def test_best_first_and_failures_last(tmp_path: Path, mode: str, first: int) -> None:
    ledger = written(tmp_path)
    ledger.ended("done", 3, metric=1.0, step=8)
    order = [t.number for t in ranked(ledger.trials.values(), mode)]
    assert order == [first, 3 - first, 2, 4, 1]
