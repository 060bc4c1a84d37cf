"""A sweep whose driver, with its whole private Ray, is killed again and again, at random instants.

Every trial ends once, none runs again behind its end, the best one and its bytes are those of the
same sweep left alone. `pytest -m cluster -s tests/cluster/test_sweep_kills.py` prints the figures.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytune_ft.training.run_folder import read_jsonl
from tests import runs

KILLS = 20
TRIALS = 16
LIMIT_S = 2400
ENDS = ("done", "stopped", "failed")
SPACE = """
tune:
  space:
    train.lr: {low: 1.0e-4, high: 3.0e-2, log: 1}
    lora.r: [2, 4, 8]
    lora.alpha: "2 * lora.r"
  trials: 16
  concurrent: 2
"""
WORDS = (
    "train.epochs=2", "train.max_steps=8", "checkpoint.every=2", "chat_eval.prompts=[]",
    "run.trackers=[]",
)  # fmt: skip


class Driver:
    """A sweep's process with a Ray of its own, known by a folder that no other process names."""

    def __init__(self, recipe: Path, temporary: Path, log: Path) -> None:
        self.temporary = temporary
        temporary.mkdir(exist_ok=True)
        # a busy machine would give Ray's processes, which are nice to others, next to nothing
        own = {"RAY_TMPDIR": str(temporary), "RAY_worker_niceness": "0"}
        environment = {**os.environ, **own}
        environment.pop("RAY_ADDRESS", None)
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raytune_ft.tune", "--config", str(recipe), *WORDS],
                env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> int:
        """Kill the driver first and then whatever it started; return how many there were."""
        self.process.kill()
        killed = 1
        while found := self.left():
            for each in found:
                killed += 1
                try:
                    os.kill(each, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self.process.wait()
        return killed

    def left(self) -> list[int]:
        """Find processes that have our folder in their environment."""
        mark = f"RAY_TMPDIR={self.temporary}".encode()
        found = []
        for each in psutil.process_iter():
            try:
                environment = Path(f"/proc/{each.pid}/environ").read_bytes()
                is_ours = mark in environment and each.status() != psutil.STATUS_ZOMBIE
            except (OSError, psutil.Error):
                continue
            if is_ours and each.pid != os.getpid():
                found.append(each.pid)
        return found


def events(sweep: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(sweep / "trials.jsonl"))


def steps_taken(sweep: Path) -> int:
    """Count the steps that all trials have on record."""
    return sum(len(list(read_jsonl(path))) for path in sweep.glob("trials/*/metrics.jsonl"))


def wait_for_work(driver: Driver, sweep: Path, dice: random.Random, deadline: float) -> bool:
    """Return at a random instant of a life; False if the sweep ended before.

    One half of them by the clock, most of which meets a start, the other by what was done.
    """
    begun, since = steps_taken(sweep) + len(events(sweep)), time.monotonic()
    seconds, work = dice.choice([(dice.uniform(0, 30), 1000), (1e9, dice.randint(1, 9))])
    while driver.process.poll() is None:
        done = steps_taken(sweep) + len(events(sweep)) - begun
        if done >= work or time.monotonic() - since > seconds:
            time.sleep(dice.random())
            return True
        assert time.monotonic() < deadline, "the sweep does not go on"
        time.sleep(0.02)
    return False


def finish(recipe: Path, folder: Path, name: str, seed: int, kills: int) -> dict[str, Any]:
    """Run a sweep to its end, its driver being killed so many times."""
    dice, sweep = random.Random(seed), folder / "runs" / name
    temporary, log = Path(f"/tmp/rk{os.getpid()}_{name}"), folder / f"{name}.log"
    deadline = time.monotonic() + LIMIT_S
    killed = processes = 0
    lost: list[float] = []
    while killed < kills:
        begun = time.monotonic()
        driver = Driver(recipe, temporary, log)
        on = wait_for_work(driver, sweep, dice, deadline)
        assert on, f"ended before {kills} kills: {log.read_text()[-3000:]}"
        processes += driver.kill()
        killed += 1
        lost.append(time.monotonic() - begun)
        print(f"kill {killed}: {lost[-1]:.0f} s, {Counter(e['event'] for e in events(sweep))}")
    driver = Driver(recipe, temporary, log)
    assert driver.process.wait(deadline - time.monotonic()) == 0, log.read_text()[-3000:]
    time.sleep(1)
    assert driver.left() == []
    return {"kills": killed, "processes": processes}


def check_ledger(sweep: Path) -> dict[int, tuple[Any, ...]]:
    """Return how each trial ended, having seen that it did so once and did not run again."""
    ends: dict[int, tuple[Any, ...]] = {}
    for event in events(sweep):
        number = event["trial"]
        if event["event"] == "planned":
            continue
        assert number not in ends, f"trial {number} runs again: {event}"
        if event["event"] in ENDS:
            ends[number] = (event["event"], event["metric"], event["step"])
    return ends


def same(calm: Path, killed: Path) -> str:
    """See that two sweeps ended in the same way, each trial once; say how."""
    ends = check_ledger(killed)
    assert sorted(ends) == list(range(TRIALS))
    assert ends == check_ledger(calm)
    assert {e[0] for e in ends.values()} >= {"done", "stopped"}
    for sweep in (calm, killed):
        kept = [e["values"] for e in events(sweep) if e["event"] == "planned"]
        assert len(kept) == TRIALS
    best = [next(read_jsonl(s / "leaderboard.jsonl")) for s in (calm, killed)]
    assert best[0]["trial"] == best[1]["trial"]
    weights = [runs.sha256(s / "best/adapter_model.safetensors") for s in (calm, killed)]
    assert weights[0] == weights[1]
    begins = Counter(e["trial"] for e in events(killed) if e["event"] == "started")
    return (
        f"{Counter(e[0] for e in ends.values())}, trials taken up again "
        f"{sum(begins.values()) - TRIALS} times, best trial {best[1]['trial']} in both, same bytes"
    )


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(2 * LIMIT_S)
def test_twenty_kills_change_nothing(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    for name in ("calm", "killed"):
        recipe = runs.write_recipe(tmp_path, tiny_model, chats, name)
        with recipe.open("a") as file:
            file.write(SPACE)
    begun = time.monotonic()
    finish(tmp_path / "calm.yaml", tmp_path, "calm", 0, 0)
    calm_s = time.monotonic() - begun
    seed = int(os.environ.get("SWEEP_KILLS_SEED", time.time_ns() % 10**6))
    print(f"undisturbed: {calm_s:.0f} s; seed {seed}")
    begun = time.monotonic()
    figures = finish(tmp_path / "killed.yaml", tmp_path, "killed", seed, KILLS)
    killed_s = time.monotonic() - begun
    said = same(tmp_path / "runs/calm", tmp_path / "runs/killed")
    print(
        f"{figures['kills']} kills of {figures['processes']} processes in {killed_s:.0f} s: {said}"
    )
