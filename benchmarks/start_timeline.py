"""When each process of a start began and what it reached: a look at /proc beside it.

In: a run that is starting. Out: a line for each of its processes: when it began, what Ray called it
and when, when which library lay in its memory, and its seconds of CPU; and where rank 0's training
thread stood at how many looks. It writes that itself when its watchdog's signal comes, so nothing
of the run is another one than people have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scaling_runs import Run

LOOK_S = 0.1
MOST = 40
"""Places that are told."""
PACKAGE, LOOP = "raytune_ft", "train_loop_per_worker"
FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
LIBRARIES = {
    "_raylet.so": "ray",
    "libtorch_python.so": "torch",
    "libcudart": "CUDA",
    "_safetensors_rust": "safetensors",
    "tokenizers.abi3.so": "tokenizers",
    "libbitsandbytes": "bitsandbytes",
    "libnccl": "NCCL",
}
"""Part of a mapped file's name, and what stands for it in the line."""


@dataclass
class Life:
    """What was seen of one process."""

    begun: float
    """Seconds behind the run's start, as the other times here."""
    names: dict[str, float] = field(default_factory=dict)
    libraries: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0

    def to_json(self, pid: int) -> dict[str, Any]:
        """Return it as a line of output."""
        return {
            "process": pid,
            "begun_s": round(self.begun, 1),
            "names": self.names,
            "libraries": self.libraries,
            "cpu_s": round(self.cpu_s, 1),
        }


class Timeline(threading.Thread):
    """Looks at a run's processes until it is told to end."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self.run_seen = run
        self.lives: dict[int, Life] = {}
        self._over = threading.Event()
        self._zero = time.time() - (time.monotonic() - run.begun)

    def begun(self) -> Timeline:
        """Begin to look."""
        self.start()
        return self

    def run(self) -> None:
        """Look again and again."""
        while not self._over.wait(LOOK_S):
            self._ask_rank()
            for process in self._family():
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(process)

    def end(self) -> list[dict[str, Any]]:
        """Return a line for each process, in the order of their beginnings, and rank 0's places."""
        self._over.set()
        self.join()
        lives = sorted(self.lives.items(), key=lambda item: item[1].begun)
        return [*(one.to_json(pid) for pid, one in lives), {"rank_0_stood": self._places()}]

    def _ask_rank(self) -> None:
        """Have rank 0 write its stacks, once it can: the signal would end it before."""
        stacks = self.run_seen.path / "stacks"
        with contextlib.suppress(OSError, ValueError, KeyError):
            pulse = json.loads((stacks / ".pulse_0.json").read_text(encoding="utf-8"))
            if _takes_signal(pulse["pid"]):
                os.kill(pulse["pid"], signal.SIGUSR1)

    def _places(self) -> dict[str, int]:
        """Return the project's innermost lines, and what they called, by the looks they took."""
        file = self.run_seen.path / "stacks" / ".signal_0"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        found = Counter[str]()
        for stack in text.split("Thread 0x"):
            frames = FRAME.findall(stack)
            own = [n for n, (path, _, _) in enumerate(frames) if f"/{PACKAGE}/" in path]
            if any(name == LOOP for _, _, name in frames) and own:
                around = frames[max(0, own[0] - 2) : own[0] + 2]
                found[" < ".join(f"{Path(p).name}:{n} {name}" for p, n, name in around)] += 1
        return dict(found.most_common(MOST))

    def _family(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.run_seen.process.pid)
            yield from [root, *root.children(recursive=True)]

    def _look(self, process: psutil.Process) -> None:
        now = round(time.time() - self._zero, 1)
        life = self.lives.get(process.pid)
        if life is None:
            life = self.lives[process.pid] = Life(process.create_time() - self._zero)
        life.names.setdefault(_called(process), now)
        life.cpu_s = sum(process.cpu_times()[:2])
        wanted = [part for part, name in LIBRARIES.items() if name not in life.libraries]
        maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
        for part in wanted:
            if part in maps:
                life.libraries[LIBRARIES[part]] = now


def _takes_signal(pid: int) -> bool:
    """Tell whether a process catches the signal, which it would end at otherwise."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", status)
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def _called(process: psutil.Process) -> str:
    """Return what a process is called: Ray's title, or its program and what it runs."""
    words = process.cmdline()
    if not words:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0][:60]
    if Path(words[0]).name.startswith("python"):
        return next((Path(word).name for word in words[1:] if not word.startswith("-")), words[0])
    return Path(words[0]).name
