"""Real sweeps for tests: the command line on a tiny model, and what their ledgers say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_ft.training.run_folder import read_jsonl
from tests import runs

ENDS = ("done", "stopped", "failed")
ENDS_IN_S = 1200
STARTS = 3
SHORT = (
    "train.epochs=8", "train.max_steps=24", "train.deepspeed=none", "checkpoint.every=4",
    "chat_eval.prompts=[]", "run.trackers=[]",
)  # fmt: skip
"""Words that make a quick sweep of trials with several checkpoints."""


def write_recipe(folder: Path, model: Path, data: Path, name: str, tune: str) -> Path:
    """Write the recipe of a sweep; `tune` is its section, in YAML."""
    recipe = runs.write_recipe(folder, model, data, name)
    with recipe.open("a") as file:
        file.write(f"tune: {tune}\n")
    return recipe


def begin(*words: object) -> subprocess.Popen[str]:
    """Begin `raytune-ft tune` with a Ray of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["RAY_worker_niceness"] = "0"  # 15 starves them where others work on the machine
    return subprocess.Popen(
        [sys.executable, "-m", "raytune_ft.tune", *map(str, words)],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a sweep; return its exit code and what it printed for people."""
    _, printed = process.communicate(timeout=ENDS_IN_S)
    return process.returncode, printed


def until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Wait until something is so while a sweep goes on."""
    deadline = time.monotonic() + ENDS_IN_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def run(*words: object) -> str:
    """Run a sweep to its end; return what it printed for people."""
    for _ in range(STARTS):
        code, printed = ended(begin(*words))
        if code == 0 or "Ray did not start" not in printed:  # as on a busy machine
            break
    assert code == 0, printed
    return printed


def steps_of(trial: Path) -> int:
    """Count the steps that a trial has on record."""
    return len(list(read_jsonl(trial / "metrics.jsonl")))


def ends_of(sweep: Path) -> dict[int, tuple[str, int, float]]:
    """Return how, where and with what each trial ended, having seen that it did so once."""
    found: dict[int, tuple[str, int, float]] = {}
    for event in read_jsonl(sweep / "trials.jsonl"):
        number: int = event["trial"]
        assert number not in found, f"trial {number} runs again behind its end: {event}"
        if event["event"] in ENDS:
            found[number] = (event["event"], event["step"], event["metric"])
    return found


def begins_of(sweep: Path) -> list[int]:
    """Return the trials that began or began again, in this order."""
    lines: list[dict[str, Any]] = list(read_jsonl(sweep / "trials.jsonl"))
    return [line["trial"] for line in lines if line["event"] == "started"]
