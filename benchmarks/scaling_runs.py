"""Runs of the scaling benchmark: a recipe and GPUs in, `raytune-ft train` as a process out.

Each has a Ray of its own in a temporary folder, sees the GPUs it is given alone, and can be ended
with everything that belongs to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02
WARM = 2
"""Steps that are not timed: kernels are loaded and memory is taken."""
GIB = 2**30


def environment(gpus: list[str]) -> dict[str, str]:
    """Return the environment of a process that may use these GPUs; without any, the CPU."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env.pop("DS_ACCELERATOR", None)
    env.pop("RAY_ADDRESS", None)
    if gpus:
        # multicast over NVLink is off where GPUs of a host are lent one by one
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "NCCL_NVLS_ENABLE": "0"}
    else:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


@dataclass
class Run:
    """One training run."""

    name: str
    folder: Path
    """Of all runs of this benchmark."""
    recipe: dict[str, Any] | str
    """Its content, or the name of a shipped one."""
    gpus: list[str]
    overrides: tuple[str, ...] = ()
    module: str = "benchmarks.counted"
    cwd: Path = ROOT
    begun: float = 0.0
    temporary: str = ""
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def path(self) -> Path:
        """Its run folder."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """What it prints for people."""
        return self.folder / f"{self.name}.log"

    def start(self) -> Run:
        """Start it."""
        if isinstance(self.recipe, dict):
            config = self.folder / f"{self.name}.yaml"
            config.write_text(yaml.safe_dump(self.recipe), encoding="utf-8")
        else:
            config = Path(self.recipe)
        where = (f"run.name={self.name}", f"run.storage={self.folder / 'runs'}")
        command = [sys.executable, "-m", self.module, "--config", str(config),
                   *where, *self.overrides]  # fmt: skip
        self.temporary = tempfile.mkdtemp(prefix="rs", dir="/tmp")  # sockets have short names
        env = environment(self.gpus) | {"RAY_TMPDIR": self.temporary}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=env, cwd=self.cwd
            )
        self.begun = time.monotonic()
        return self

    def wait_until(self, ready: Callable[[], bool], deadline: float) -> bool:
        """Wait until something is so; False if the run ends or the time is over before."""
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return ready()
            time.sleep(POLL_S)
        return True

    def wait(self, deadline: float) -> int | None:
        """Return the exit code; None if it has not ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        return None

    def end(self) -> None:
        """End it with all that it started, and remove its Ray's folder."""
        family = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for one in [*family, *self._of_its_ray()]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=20)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def spent(self) -> tuple[float, int]:
        """Return seconds of CPU of its processes and of those they waited for; how many live."""
        root = psutil.Process(self.process.pid)
        family = {one.pid: one for one in [root, *root.children(recursive=True)]}
        family |= {one.pid: one for one in self._of_its_ray()}
        seconds = 0.0
        for one in family.values():
            with contextlib.suppress(psutil.Error):
                seconds += sum(one.cpu_times()[:4])  # user, system, and both of its children
        return seconds, len(family)

    def _of_its_ray(self) -> Iterator[psutil.Process]:
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.temporary in word for word in one.cmdline()):
                    yield one

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file of the run; a line that is being written is left out."""
        file = self.path / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    def step(self) -> int:
        """Return the last step in its ledger."""
        return max((line["step"] for line in self.lines("metrics.jsonl")), default=0)

    def words(self) -> str:
        """Return the end of what it printed."""
        if not self.log.exists():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:]

    def signal_rank(self, rank: int, number: signal.Signals) -> int:
        """Send a signal to the process of a rank, whose pulse file has its number."""
        pulse = json.loads((self.path / f"stacks/.pulse_{rank}.json").read_text(encoding="utf-8"))
        os.kill(pulse["pid"], number)
        return int(pulse["pid"])


def figures(run: Run) -> dict[str, Any]:
    """Return speeds behind the warm-up, and what ranks sent and held, of a run's files."""
    steps = run.lines("metrics.jsonl")
    timed = steps[WARM:] or steps
    if not timed:
        return {"steps": 0}
    speeds = sorted(step["tokens_per_s"] for step in timed)
    ranks = [run.lines(f"traffic_{rank}.jsonl") for rank in range(len(timed[-1]["rank_seconds"]))]
    last = [lines[-1] for lines in ranks if lines]
    return {
        "steps": len(steps),
        "tokens_per_s": round(statistics.median(speeds)),
        "tokens_per_s_range": [round(speeds[0]), round(speeds[-1])],
        "step_s": round(statistics.median(step["seconds"] for step in timed), 3),
        "slowest_over_fastest_rank": round(
            max(max(s["rank_seconds"]) / min(s["rank_seconds"]) for s in timed), 3
        ),
        "data_wait": round(max(step["data_wait"] for step in timed), 4),
        "tokens_per_step": timed[-1]["tokens"],
        "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
        "grad_norm": round(steps[-1]["grad_norm"], 4),
        "mfu": timed[-1]["mfu"],
        "micro_steps": last[0]["micro_steps"] if last else 0,
        "payloads": last[0]["payloads"] if last else {},
        "calls": last[0]["calls"] if last else {},
        "small": last[0]["small"] if last else 0,
        "sent_per_rank": [round(line["sent"]) for line in last],
        "peak_gib_per_rank": [round(line["peak"] / GIB, 2) for line in last],
    }
