"""Hangs: every injected one ends in time, with a stack of each rank; honest work does not."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_ft.training.guarding.watchdog import EXIT_CODE
from raytune_ft.training.run_folder import read_jsonl
from tests.faults import gloo

LIMIT_S = 5
"""`run.collective_timeout` of the ranks; by default it is 100, and a run ends before 120."""
LOADING_S = 4.0
"""The same before the first step, of `tests.faults.ranks`."""
BEHIND_S = 12
"""For the stacks, and for two cores that many processes share."""
INJURIES = {
    "sleeps_in_backward": "in sleeps_in_backward",
    "skips_a_collective": "in all_gather",
    "data_stalls": "in data",
    "holds_the_interpreter": "it wrote this at a signal",
    "is_stopped": "its process is T (stopped)",
}
"""Scenario -> what the stack of the injured rank says."""


@dataclass
class Hang:
    """One injected hang."""

    injury: str
    world: int
    victim: int
    at: int

    def check(self, started: gloo.Started) -> None:
        """Look at what is left of it."""
        codes = started.wait(LIMIT_S + BEHIND_S + 40)
        assert None not in codes, f"{self} has not ended\n{started.printed()}"
        assert EXIT_CODE in codes, f"{self}\n{started.printed()}"
        folder = started.folder
        stacks = [(folder / f"stacks/rank_{r}.txt").read_text() for r in range(self.world)]
        for rank, stack in enumerate(stacks):
            ahead = self.injury == "skips_a_collective" and rank == self.victim
            assert stack.startswith(f"rank {rank}, step {self.at + ahead}, "), f"{self}\n{stack}"
            if rank != self.victim:
                assert "in all_gather" in stack or "in all_reduce" in stack, f"{self}\n{stack}"
        assert INJURIES[self.injury] in stacks[self.victim], f"{self}\n{stacks[self.victim]}"
        (told,) = read_jsonl(folder / "failures.jsonl")
        words = f"step {self.at}: no worker went on for {LIMIT_S} s (rank 0: "
        assert told["words"].startswith(words)
        assert (told["step"], told["fatal"], told["kind"]) == (self.at, False, "hang")


def test_every_hang_ends_with_the_stack_of_every_rank(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Five injuries side by side; `--faults=4` makes it twenty, of two to four ranks."""
    for trial in range(request.config.getoption("--faults")):
        seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 2**32)) + trial
        print(f"FAULT_SEED={seed}")
        draw = random.Random(seed)
        hangs = []
        for injury in INJURIES:
            world = draw.randint(2, 4) if trial else 2
            hangs.append(Hang(injury, world, draw.randrange(world), draw.randint(1, 7)))
        started = [
            gloo.start(h.injury, tmp_path / f"{trial}_{h.injury}", world=h.world, victim=h.victim,
                       at=h.at)
            for h in hangs
        ]  # fmt: skip
        for hang, run in zip(hangs, started, strict=True):
            hang.check(run)


def test_a_hang_before_the_first_step_ends_as_well(tmp_path: Path) -> None:
    started = gloo.start("hangs_while_loading", tmp_path, victim=1, at=1)
    codes = started.wait(LOADING_S + BEHIND_S + 40)
    assert None not in codes and EXIT_CODE in codes, started.printed()
    stacks = [(tmp_path / f"stacks/rank_{r}.txt").read_text() for r in range(2)]
    assert all(s.startswith(f"rank {r}, step 0, start, ") for r, s in enumerate(stacks)), stacks
    assert "in all_gather" in stacks[0] and "in hangs_while_loading" in stacks[1]
    (told,) = read_jsonl(tmp_path / "failures.jsonl")
    assert told["words"].startswith(f"step 0: no worker went on for {LOADING_S:g} s (rank 0: start")
    assert (told["step"], told["fatal"], told["kind"]) == (0, False, "hang")


def test_a_long_wait_for_a_rank_that_works_is_no_hang(tmp_path: Path) -> None:
    """Rank 0 takes 8 seconds for its answers, the others wait in the next step's exchange.

    Beside it one rank loads for 12 seconds, of which none without a weight or a MiB of a file.
    """
    begun = time.monotonic()
    runs = [
        gloo.start("works_long_alone", tmp_path / "asks", victim=0, at=4, sample_every=4),
        gloo.start("loads_slowly", tmp_path / "loads", victim=1, at=1),
    ]
    for started in runs:
        assert started.wait(90) == [0, 0], started.printed()
        left = started.folder / "stacks"
        assert not left.exists(), "nothing is left of a run without a hang"
    assert time.monotonic() - begun > 2 * LOADING_S + 1


ENDS = {
    "data_ends_early": "step 5: the data ended in epoch 1 of 1",
    "loss_is_nan": "step 5: loss is nan on rows [5]; lower train.lr or look at these rows; "
    "the last checkpoint is unharmed",
    "gradient_is_nan": "step 5: gradient norm is nan on rows [5]; lower train.lr or look at these "
    "rows; the last checkpoint is unharmed",
}


def test_what_one_rank_meets_ends_all_at_once(tmp_path: Path) -> None:
    """No rank waits for one that is done, as a hang's stacks would show."""
    started = {
        (scenario, victim): gloo.start(scenario, tmp_path / f"{scenario}_{victim}",
                                       victim=victim, at=5)
        for scenario in ENDS for victim in range(2)
    }  # fmt: skip
    for (scenario, _), run in started.items():
        assert run.wait(60) == [0, 0], run.printed()
        told = list(read_jsonl(run.folder / "failures.jsonl"))
        assert {entry["words"] for entry in told} == {ENDS[scenario]}
        assert all(entry["fatal"] for entry in told)
        assert not (run.folder / "stacks/rank_0.txt").exists()
        for rank in range(2):
            steps = [e["step"] for e in read_jsonl(run.folder / f"told_{rank}.jsonl")]
            assert steps == [1, 2, 3, 4]


def test_one_rank_s_sigterm_stops_all_behind_the_same_checkpoint(tmp_path: Path) -> None:
    started = gloo.start("is_asked_to_stop", tmp_path, victim=1, at=3)
    assert started.wait(60) == [0, 0], started.printed()
    told = [(e["type"], e["words"]) for e in read_jsonl(tmp_path / "failures.jsonl")]
    assert set(told) == {("Interrupted", "stopped after step 3")}
    for rank in range(2):
        assert list(read_jsonl(tmp_path / f"saved_{rank}.jsonl")) == [{"step": 3}]
