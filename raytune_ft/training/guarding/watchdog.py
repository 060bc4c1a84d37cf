"""Watchdog: ends a run whose ranks wait for each other, or for data, with every rank's stack.

Each rank has one, a thread beside the training. It writes its rank's pulse into a small file and
reads those of the others. As long as any rank's pulse beats, somebody works and the others may
wait: a long step, six hundred tokens of an answer, a large checkpoint. Where no rank has beaten for
`limit_s`, every rank's stack goes to `stacks/rank_K.txt` and the processes end, so that Ray Train
starts them again from the last checkpoint. Until a rank expects steps it loads, and what it reads
is a sign of life as well.

Files and no store: a store lives in one of the ranks, which may be the one that hangs.

    stacks/.pulse_K.json     written by rank K, read by all
    stacks/.asked            the attempt whose stacks are wanted, by whoever noticed first
    stacks/rank_K.txt        the stack, first line: which rank, where, since when
    stacks/.signal_K         what a signal made rank K write that no thread of it could
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from raytune_ft.training.guarding import memory_end
from raytune_ft.training.guarding.pulse import READ_AT_ONCE, Pulse, bytes_read

FOLDER = "stacks"
POLL_S = 1.0
GRACE_S = 4.0
"""Ranks look once a second, and a stack is written at once."""
MARGIN_S = 10
"""By how much a collective itself waits longer than the watchdog, should that have failed."""
PATIENCE_S = 1800
"""How long a collective waits where one rank may work and others wait."""
LOADING_S = 600.0
"""Without a weight or a MiB of a file, before the first step: DeepSpeed compiles for minutes."""
EXIT_CODE = 70


@dataclass(frozen=True)
class Place:
    """Which rank of which start of which run."""

    folder: Path
    """Of the stacks."""
    rank: int
    world: int
    attempt: int
    """The same on all ranks, another one at every start."""


class Watchdog:
    """The thread of one rank.

    Args:
        place: of this rank.
        pulse: of this process.
        limit_s: seconds without a beat of any rank.
        hung: called by one rank, the first that noticed, with one line for the user and the step,
            of the rank that is least far.
        end: called at the very end; it does not return.
    """

    def __init__(
        self,
        place: Place,
        pulse: Pulse,
        limit_s: float,
        hung: Callable[[str, int], object],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.place, self.pulse, self.limit_s = place, pulse, limit_s
        self.hung, self.end = hung, end
        self._loads, self._read = True, 0
        self._idle = 0.0
        self._seen: dict[int, Any] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._signalled: IO[bytes] | None = None

    def __enter__(self) -> Watchdog:
        folder, rank = self.place.folder, self.place.rank
        folder.mkdir(parents=True, exist_ok=True)
        self._signalled = (folder / f".signal_{rank}").open("wb", buffering=0)
        # the fault handler needs no lock of the interpreter, which a hung library may hold
        faulthandler.register(signal.SIGUSR1, self._signalled, all_threads=True, chain=False)
        self._tell()  # a process that is stopped at once is known all the same
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def poll_s(self) -> float:
        """Seconds between two looks."""
        return min(POLL_S, self.limit_s / 10)

    def expect(self, limit_s: float) -> None:
        """Wait for so many seconds from now on, for beats alone: all ranks have loaded."""
        self.pulse.beat()  # before the limit, which the time that was spent so far may exceed
        self._loads, self.limit_s = False, limit_s

    def stop(self) -> None:
        """Watch no longer, and take away what only a watched run leaves behind."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join(timeout=GRACE_S)
        faulthandler.unregister(signal.SIGUSR1)
        if self._signalled is not None:
            self._signalled.close()
        for name in (f".pulse_{self.place.rank}.json", f".signal_{self.place.rank}"):
            with contextlib.suppress(OSError):
                (self.place.folder / name).unlink()
        with contextlib.suppress(OSError):  # of a run without a hang nothing is left
            self.place.folder.rmdir()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(self.poll_s):
            # a process that was stopped and goes on has not been waiting meanwhile
            now = time.monotonic()
            self._idle += min(now - looked, 2 * self.poll_s)
            looked = now
            if self._loads:
                self._look_at_files()
            self._tell()
            if self._changed():
                self._idle = 0.0
            if self._idle >= self.limit_s or self._asked() == str(self.place.attempt):
                self._finish()
                return

    def _look_at_files(self) -> None:
        before, self._read = self._read, bytes_read()
        if self._read - before >= READ_AT_ONCE:
            self.pulse.beat()

    def _tell(self) -> None:
        own = {
            "attempt": self.place.attempt, "beats": self.pulse.beats, "phase": self.pulse.phase,
            "step": self.pulse.step, "pid": os.getpid(), "host": host(),
            "memory": {"kills": memory_end.kills(), "share": memory_end.share()},
        }  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk stops checkpoints, not this
            path = self.place.folder / f".pulse_{self.place.rank}.json"
            half = path.with_suffix(".half")
            half.write_text(json.dumps(own), encoding="utf-8")
            half.replace(path)

    def _changed(self) -> bool:
        """Look at every rank's beats; tell whether any has beaten since the last look."""
        changed = False
        for rank in range(self.place.world):
            found = self._pulse_of(rank)
            beats = self.pulse.beats if rank == self.place.rank else found.get("beats")
            if beats is not None and self._seen.get(rank) != beats:
                self._seen[rank] = beats
                changed = True
        return changed

    def _pulse_of(self, rank: int) -> dict[str, Any]:
        try:
            text = (self.place.folder / f".pulse_{rank}.json").read_text(encoding="utf-8")
            found: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):  # not there yet, or being written
            return {}
        return found if found.get("attempt") == self.place.attempt else {}

    def _asked(self) -> str:
        try:
            return (self.place.folder / ".asked").read_text(encoding="utf-8")
        except OSError:
            return ""

    def _finish(self) -> None:
        """Write this rank's stack, have the others write theirs, and end the process."""
        try:
            with contextlib.suppress(OSError):
                (self.place.folder / ".asked").write_text(str(self.place.attempt), encoding="utf-8")
                with self._stack_file(self.place.rank).open("w", encoding="utf-8") as file:
                    file.write(self._heading(self.place.rank))
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            if self._is_first():
                self._see_to_others()
                self._speak()
            else:
                self._wait(lambda: not self._missing(), 3 * GRACE_S)
        finally:
            self.end(EXIT_CODE)

    def _is_first(self) -> bool:
        """Tell whether this rank is the one that speaks for all."""
        with contextlib.suppress(OSError):
            path = self.place.folder / f".first_{self.place.attempt}"
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        return False

    def _see_to_others(self) -> None:
        """Wait for the others' stacks; write for those that cannot, and end them."""
        self._wait(lambda: not self._missing(), GRACE_S)
        missing = self._missing()
        for rank in missing:
            self._signal(rank, signal.SIGUSR1)
        if missing:
            time.sleep(GRACE_S / 4)
        for rank in missing:
            found = self.place.folder / f".signal_{rank}"
            stack = found.read_text(encoding="utf-8") if found.is_file() else ""
            why = "it wrote this at a signal" if stack else f"no answer{self._state_of(rank)}"
            self._stack_file(rank).write_text(
                f"{self._heading(rank)}its watchdog did not write: {why}\n{stack}", encoding="utf-8"
            )
            self._signal(rank, signal.SIGKILL)

    def _missing(self) -> list[int]:
        return [r for r in range(self.place.world) if not self._has_stack(r)]

    def _has_stack(self, rank: int) -> bool:
        try:
            with self._stack_file(rank).open(encoding="utf-8") as file:
                return f"start {self.place.attempt}," in file.readline()
        except OSError:
            return False

    def _stack_file(self, rank: int) -> Path:
        return self.place.folder / f"rank_{rank}.txt"

    def _heading(self, rank: int) -> str:
        own = rank == self.place.rank
        found = {"phase": self.pulse.phase, "step": self.pulse.step, "pid": os.getpid()}
        found = found if own else self._pulse_of(rank)
        return (
            f"rank {rank}, step {found.get('step', '?')}, {found.get('phase', 'not started')}, "
            f"process {found.get('pid', '?')}, start {self.place.attempt}, "
            f"no beat for {self.limit_s:g} s\n"
        )

    def _speak(self) -> None:
        found = {rank: self._pulse_of(rank) for rank in range(self.place.world)}
        where = ", ".join(f"rank {r}: {p.get('phase', 'not started')}" for r, p in found.items())
        step = min(pulse.get("step", self.pulse.step) for pulse in found.values())
        self.hung(
            f"step {step}: no worker went on for {self.limit_s:g} s ({where}); their stacks are in "
            f"{self.place.folder}",
            step,
        )

    def _state_of(self, rank: int) -> str:
        """Say what the system says of a rank's process, if it is on this machine."""
        found = self._pulse_of(rank)
        if found.get("host") != host():
            return ""
        try:
            status = Path(f"/proc/{found['pid']}/status").read_text(encoding="utf-8")
        except OSError:
            return "; its process is gone"
        lines = [line for line in status.splitlines() if line.startswith("State:")]
        return f"; its process is {lines[0].split(maxsplit=1)[1]}" if lines else ""

    def _signal(self, rank: int, number: signal.Signals) -> None:
        found = self._pulse_of(rank)
        if found.get("host") == host():
            with contextlib.suppress(OSError):
                os.kill(int(found["pid"]), number)

    def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready() and time.monotonic() < deadline:
            time.sleep(self.poll_s / 5)


def left_behind(folder: Path) -> dict[str, Any] | None:
    """Return the pulse, furthest of all ranks, of a start whose processes wrote no end."""
    found = []
    for path in folder.glob(".pulse_*.json") if folder.is_dir() else ():
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return max(found, key=lambda pulse: (pulse["attempt"], pulse["step"]), default=None)


def forget(folder: Path) -> None:
    """Remove what earlier starts left beside the stacks."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        path.unlink(missing_ok=True)


def host() -> str:
    """Name what process numbers are unique in: a boot of a machine, and a container of it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def set_timeouts(seconds: float) -> None:
    """Set how long every collective of this process waits, DeepSpeed's groups included."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextlib.contextmanager
def patience(device: torch.device, limit_s: float) -> Iterator[None]:
    """Let ranks come out of the block at very different times, and wait for each other there.

    Inside, and while they wait, collectives have PATIENCE_S; behind it `limit_s` and a margin.
    The watchdog goes on: it ends a block in which no rank works.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    set_timeouts(PATIENCE_S)
    yield
    met = torch.zeros(1, device=device)
    dist.all_reduce(met)
    met.item()  # a GPU's collective is waited for here, not in the step
    set_timeouts(limit_s + MARGIN_S)
