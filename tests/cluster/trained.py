"""Runs of `raytune_ft.train` on hosts: a recipe of several gloo workers, and what came of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests.cluster.hosts import DISK, Cluster
from tests.conftest import make_tiny_model, write_chats

ROWS = 240
ENDS_IN_S = 600.0
POLL_S = 0.1


def make_inputs(folder: Path) -> None:
    """Write a tiny model and rows, `model` and `rows.jsonl`."""
    (folder / "model").mkdir()
    make_tiny_model(folder / "model")
    write_chats(folder / "rows.jsonl", ROWS)


def begin(
    cluster: Cluster, number: int, inputs: Path, name: str, *, alone: bool = False, **settings: Any
) -> Driver:
    """Begin a run from a host, on whose disk alone are its inputs and its folder.

    Args:
        cluster: with disks.
        number: of the host.
        inputs: of `make_inputs`.
        name: of the run.
        alone: whether the driver starts a Ray of its own.
        settings: as `recipe_of` takes them.
    """
    disk = cluster.disk(number)
    if not (disk / "inputs").exists():
        shutil.copytree(inputs, disk / "inputs")
    (disk / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(name, **settings)))
    words = ["--config", f"{DISK}/{name}.yaml"]
    return Driver(cluster, number, words, RunFolder(disk / "runs" / name), alone)


def recipe_of(name: str, **settings: Any) -> dict[str, Any]:
    """Return a recipe: 4 workers, a step of 4 packs, dropout, held-out rows, saved every 5 steps.

    Args:
        name: of the run.
        settings: fields of the section `run`, and of other sections where they are a mapping.
    """
    inputs = f"{DISK}/inputs"
    content: dict[str, Any] = {
        "model": {"path": f"{inputs}/model"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": f"{inputs}/rows.jsonl"}], "max_length": 96,
                 "window": 40, "validation": 0.125},
        "train": {"epochs": 3, "accumulation": 1, "lr": 5e-3, "log_every": 1,
                  "deepspeed": "none"},  # whose import takes as long as all else
        "eval": {"every": 20},
        "checkpoint": {"every": 5, "keep": 2},
        "chat_eval": {"every": None, "prompts": ["what is red?"], "max_new_tokens": 4},
        "run": {"name": name, "workers": 4, "trackers": [], "storage": f"{DISK}/runs"},
    }  # fmt: skip
    for key, value in settings.items():
        section = key if isinstance(value, dict) else "run"
        content[section].update(value if section == key else {key: value})
    return content


@dataclass
class Driver:
    """A driver of a run on a host, and what it prints.

    Args:
        cluster: of the host.
        number: of the host.
        words: behind `raytune_ft.train`.
        run: the run's folder, as this machine sees it.
        alone: whether it starts a Ray of its own instead of joining the cluster's.
    """

    cluster: Cluster
    number: int
    words: list[str]
    run: RunFolder
    alone: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.cluster.up[self.number].path(f"/tmp/driver_{time.monotonic_ns()}.out")
        env = {} if self.alone else {"RAY_ADDRESS": self.cluster.address}
        words = [sys.executable, "-m", "raytune_ft.train", *self.words]
        self.process = self.cluster.begin(self.number, words, self.output, env=env)
        self.begun = time.monotonic()

    def printed(self) -> str:
        """Return what it has printed so far; empty where its host is gone."""
        with contextlib.suppress(OSError):
            return self.output.read_text(errors="replace")
        return ""

    def step(self) -> int:
        """Return the last step in the run's ledger."""
        with contextlib.suppress(OSError):
            return max((event["step"] for event in read_jsonl(self.run.metrics)), default=0)
        return 0

    def until(self, reached: Callable[[], bool], what: str, seconds: float = ENDS_IN_S) -> float:
        """Wait until something is so; return the seconds that it took.

        Raises:
            AssertionError: the driver ended before, or it took too long; with what was printed.
        """
        begun = time.monotonic()
        while not reached():
            over = time.monotonic() - begun > seconds
            if over or self.process.poll() is not None:
                state = "not yet" if over else f"exit code {self.process.poll()} before"
                raise AssertionError(f"{what}: {state}\n{self.told()}")
            time.sleep(POLL_S)
        return time.monotonic() - begun

    def until_step(self, step: int) -> float:
        """Wait for a step in the ledger; return the seconds that it took."""
        return self.until(lambda: self.step() >= step, f"step {step}")

    def follow(self, seconds: float = ENDS_IN_S) -> tuple[int, float]:
        """Wait for its end; return the exit code, and when it went on behind the longest pause.

        The latter in seconds from now: a step that was on its way as a fault struck says nothing.
        """
        begun, step, seen = time.monotonic(), self.step(), [0.0]
        while self.process.poll() is None and seen[-1] < seconds:
            time.sleep(POLL_S)
            if (now := self.step()) > step:
                step = now
                seen.append(time.monotonic() - begun)
        pauses = [after - before for before, after in itertools.pairwise(seen)]
        longest = max(range(len(pauses)), key=pauses.__getitem__, default=-1)
        return self.end(seconds), seen[longest + 1]

    def stop(self) -> int:
        """Ask it to stop behind a checkpoint, as Ctrl-C does; return the exit code."""
        for pid in self.cluster.processes(self.number, "raytune_ft.train"):
            os.kill(pid, signal.SIGINT)
        return self.end()

    def end(self, seconds: float = ENDS_IN_S) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.told()}") from None

    def told(self) -> str:
        """Return the ends of what it printed and of the run's log."""
        log = ""
        with contextlib.suppress(OSError):
            log = self.run.log.read_text(errors="replace")[-3000:]
        return f"{self.printed()[-3000:]}\n--- run.log\n{log}"
