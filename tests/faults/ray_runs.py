"""Whole runs through Ray Train with two workers, one of whose processes is killed at any instant.

Each run has a Ray of its own in a temporary folder of its own, so that several can run at once.
What a killed driver or raylet leaves to do is what the user is told to do: `train --resume RUN`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from raytune_ft.errors import Interrupted
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.saving import durable
from tests.faults.verdict import Kill, Verdict, compare

WORKER, FEEDER, DATA_TASK, RAYLET = "RayTrainWorker", "ray::Feeder", "ray::MapBatches", "raylet"
VICTIMS = {
    "worker": WORKER, "driver": "", "raylet": RAYLET, "data task": DATA_TASK, "feeder": FEEDER,
}  # fmt: skip
"""Who may be killed, and what its command line has in it."""
ENDING = ("driver", "raylet")
"""Without these a run ends, and is taken up again by hand; without others it goes on."""
ROWS = 56
"""About 36 steps of two workers in three epochs."""
WHOLE_LIFE = 0.5
"""Share of kills whose instant is drawn from the whole life of a run."""
MOST_KILLS = 3
MOST_STARTS = 9
START, DONE = "start of Ray", "behind the end"
DEADLINE_S = 600.0
"""For a run that is not killed any more, under load."""
ENDS_IN_S = 60.0
"""For a run whose raylet is gone."""
SPOKEN_IN_S = 10.0
"""For the process that speaks for a driver that cannot."""
CODES = {"driver": {-signal.SIGKILL}, "raylet": {Interrupted.exit_code, 1}}
"""1 is Ray's own, of a driver that asked something of the raylet at that very moment."""


def prepare(inputs: Path) -> None:
    """Run once without a kill; note the seconds that it took, and those from the first step on."""
    folder = inputs / "ray" / "runs" / "whole"
    start = Start(folder, write_recipe(inputs, inputs / "ray", "whole"), resume=False)
    code = _until_a_step(start, RunFolder(folder))
    first_step = time.monotonic()
    code = start.wait(DEADLINE_S) if code is None else code
    start.clean()
    if code != 0:
        raise RuntimeError(f"the undisturbed run failed: {start.printed()}")
    ended = time.monotonic()
    life = {"seconds": ended - start.begun, "training": ended - first_step}
    (inputs / "ray.json").write_text(json.dumps(life))


def write_recipe(inputs: Path, folder: Path, name: str, every: int = 2) -> Path:
    """Write the recipe of a run of two workers: three epochs, dropout and packing."""
    content = {
        "model": {"path": str(inputs / "model")},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": str(inputs / "more.jsonl")}], "max_length": 96, "window": 8,
                 "validation": 0.125},
        "train": {"epochs": 3, "accumulation": 1, "lr": 5e-3, "log_every": 1},
        "eval": {"every": 5},
        "checkpoint": {"every": every, "keep": 2},
        "chat_eval": {"every": 6, "prompts": ["what is red?"], "max_new_tokens": 4},
        "run": {"name": name, "storage": str(folder / "runs"), "workers": 2, "max_failures": 9,
                "trackers": []},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass
class Start:
    """One start of `raytune-ft train`, with what it prints in a file."""

    folder: Path
    recipe: Path
    resume: bool
    process: subprocess.Popen[bytes] = field(init=False)
    temporary: str = field(init=False)

    def __post_init__(self) -> None:
        # Ray's sockets have at most 107 characters
        self.temporary = tempfile.mkdtemp(prefix="rf", dir="/tmp")
        what = ["--resume", str(self.folder)] if self.resume else ["--config", str(self.recipe)]
        command = [sys.executable, "-m", "raytune_ft.train", *what]
        env = {**os.environ, "RAY_TMPDIR": self.temporary}
        self.output = self.recipe.with_suffix(".out")
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
        self.begun = time.monotonic()

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if it has not ended after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=seconds)
        return None

    def printed(self) -> str:
        """Return the end of what was printed."""
        return self.output.read_text(errors="replace")[-2000:]

    def found_no_room(self) -> bool:
        """Tell whether Ray itself did not start in the time it has, as on a busy machine."""
        return "Ray did not start" in "".join(self.printed().splitlines()[-1:])

    def told_how_to_go_on(self) -> bool:
        """Tell whether the last line says it."""
        return "train --resume" in "".join(self.printed().splitlines()[-1:])

    def below(self, title: str) -> list[psutil.Process]:
        """Find the processes below the driver whose command line has a word in it."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if title in "/".join(child.cmdline()[:1]).rpartition("/")[2]:
                        found.append(child)
        return found

    def kill(self, first: str, chance: random.Random) -> str | None:
        """Kill one process: of the kind `first` if there is one just now; return the kind."""
        kinds = [kind for kind in VICTIMS if kind != first]
        chance.shuffle(kinds)
        for kind in [first, *kinds]:
            if kind == "driver":
                self.process.kill()
                return kind
            found = self.below(VICTIMS[kind])
            if found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    chance.choice(found).kill()
                    return kind
        return None

    def clean(self) -> None:
        """End what a killed driver left of its Ray, and remove its folder."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.temporary in word for word in process.cmdline()):
                    process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


class Watch:
    """Notes when the last line of a run's ledger changes, and to which step."""

    def __init__(self, run: RunFolder) -> None:
        self.metrics = run.metrics
        self.seen: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        known: tuple[int, int] | None = None
        while not self._ended.wait(0.01):
            with contextlib.suppress(OSError, StopIteration):
                stat = self.metrics.stat()
                if (stat.st_size, stat.st_ino) != known:
                    known = (stat.st_size, stat.st_ino)
                    last = max((e["step"] for e in read_jsonl(self.metrics)), default=0)
                    self.seen.append((time.monotonic(), last))

    def follow(self, kills: list[Kill]) -> None:
        """Fill in what came after each kill, and stop watching."""
        self._ended.set()
        self._thread.join()
        for kill in kills:
            later = [(at, step) for at, step in self.seen if at > kill.at]
            first = next((at for at, step in later if step > kill.step), None)
            between = [step for at, step in later if first is None or at < first]
            kill.resumed = min([kill.step, *between])
            kill.recovery_s = None if first is None else first - kill.at


def phase_of(run: RunFolder) -> str:
    """Tell by its files what a run is doing."""
    if not run.run_json.is_file():
        return START
    if run.status() == "done":
        return DONE
    if not run.metrics.is_file():
        return "start of the workers"
    if any(run.checkpoints.glob(f"{durable.WRITING}*")):
        return "saving"
    if run.adapter.exists() or any(run.path.glob(f"{durable.WRITING}*")):
        return "export and report"
    return "train"


def run_trial(inputs: Path, folder: Path, seed: int) -> Verdict:
    """Kill and go on until the run has ended; compare it with the undisturbed one.

    Args:
        inputs: what `prepare` made.
        folder: new folder of this trial.
        seed: decides the interval between saves, victims and instants; seeds that follow each
            other begin with different kinds of victims.
    """
    chance = random.Random(seed)
    life = json.loads((inputs / "ray.json").read_text())
    every = chance.choice([1, 2, 3])
    recipe, run = write_recipe(inputs, folder, "killed", every), RunFolder(folder / "runs/killed")
    kills: list[Kill] = []
    watch, starts = Watch(run), [Start(run.path, recipe, resume=False)]
    try:
        while (code := _wait(starts[-1], run, chance, kills, life)) != 0:
            if code is not None and starts[-1].found_no_room() and len(starts) < MOST_STARTS:
                starts.append(Start(run.path, recipe, resume=run.run_json.is_file()))
                continue
            if code is not None:
                raise RuntimeError(f"exit code {code} behind {kills}: {starts[-1].printed()}")
            if len(kills) == MOST_KILLS:
                raise RuntimeError(f"it hangs behind {kills[-1]}: {starts[-1].printed()}")
            first = list(VICTIMS)[(seed + len(kills)) % len(VICTIMS)]
            kill = _kill(starts[-1], run, first, chance, every)
            if kill is None:
                continue
            kills.append(kill)
            if kill.victim in ENDING:
                _check_end(starts[-1], kill)
                starts.append(Start(run.path, recipe, resume=run.run_json.is_file()))
    finally:
        watch.follow(kills)
        for start in starts:
            start.clean()
    whole = inputs / "ray" / "runs" / "whole"
    return compare(seed, f"saved every {every}", run.path, whole, kills)


def _wait(
    start: Start, run: RunFolder, chance: random.Random, kills: list[Kill], life: dict[str, float]
) -> int | None:
    """Wait for the next kill's instant; return the exit code if the run ends before it.

    Every second instant is drawn from the whole life of a run. Most of that is Ray's own start, so
    the others are drawn from what comes behind the next step.
    """
    if len(kills) == MOST_KILLS:
        return start.wait(DEADLINE_S)
    if chance.random() < WHOLE_LIFE:
        return start.wait(chance.uniform(0, life["seconds"]))
    instant = chance.uniform(0, life["training"])
    code = _until_a_step(start, run)
    return start.wait(instant) if code is None else code


def _until_a_step(start: Start, run: RunFolder) -> int | None:
    """Wait until a line is added to the ledger, or the run has ended: its exit code then."""

    def size() -> int:
        return run.metrics.stat().st_size if run.metrics.is_file() else 0

    before, ends = size(), time.monotonic() + DEADLINE_S
    while (code := start.wait(0.05)) is None and size() == before and time.monotonic() < ends:
        pass
    return code


def _kill(
    start: Start, run: RunFolder, first: str, chance: random.Random, every: int
) -> Kill | None:
    phase = phase_of(run)
    step = max((e["step"] for e in read_jsonl(run.metrics)), default=0)
    victim = start.kill(first, chance)
    if victim is None or (victim != "driver" and start.process.poll() is not None):
        return None
    now = time.monotonic()
    return Kill(now, now - start.begun, victim, phase, step, every)


def _check_end(start: Start, kill: Kill) -> None:
    """A run whose driver or raylet is gone ends, and says how to go on unless it was done."""
    code = start.wait(ENDS_IN_S)
    if code is None:
        raise RuntimeError(f"the run hangs without its {kill.victim}: {start.printed()}")
    if kill.phase in (START, DONE) or not code:
        return
    if start.found_no_room():  # a run that is taken up again has the files of a phase before
        return
    ends = time.monotonic() + SPOKEN_IN_S
    while not (told := start.told_how_to_go_on()) and time.monotonic() < ends:
        time.sleep(0.05)
    printed = start.printed()
    if not told or "Traceback" in printed or code not in CODES[kill.victim]:
        raise RuntimeError(f"exit code {code} without a {kill.victim}: {printed}")
