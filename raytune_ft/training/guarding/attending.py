"""Attending: a run's driver gives signs of life, and looks whether it was asked to stop.

A driver on another machine has no number that a reader here could look up. So it writes down the
time every few seconds, and reads what stands beside that. A request names the driver that it is
for: one that was not obeyed stops no later driver of the same run.

    alive.json   {"driver", "time", "over"}, written by the driver; over: it has ended
    stop.json    {"driver", "now"}, written by `raytune-ft stop`, removed by the driver
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.errors import Interrupted, RaytuneError
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import RunFolder

ALIVE = liveness.ALIVE
REQUEST = "stop.json"
LOOK_S = 2.0
"""Between two looks whether a stop was asked for."""
AGAIN_S = 1.0
"""From the first signal of a stop at once to the second one."""
KILL_S = 20.0
"""From there until the process is killed that obeys neither: Ray takes seconds to end."""


class Desk(Protocol):
    """Where a run's small files lie; any method may raise OSError, and elsewhere RaytuneError.

    `storing.places.Place`, of a run's own folder, is one.
    """

    def read(self, name: str) -> bytes:
        """Return a file's content."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""

    def delete(self, prefix: str) -> None:
        """Remove a file, if it is there."""


class Here:
    """The desk in a run folder of this machine.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(self.path / name)

    def delete(self, prefix: str) -> None:
        (self.path / prefix).unlink(missing_ok=True)


def ask(desk: Desk, driver: dict[str, Any], *, now: bool) -> None:
    """Ask a driver to stop behind a checkpoint, or at once; OSError if it cannot be written."""
    desk.write(REQUEST, json.dumps({"driver": driver, "now": now}).encode())


@contextmanager
def attended(folder: RunFolder, *more: Desk) -> Iterator[None]:
    """While the block runs, give signs of life and obey requests.

    A request becomes a Ctrl-C of this process, so that whatever would stop it in good order does.

    Args:
        folder: of the run that this process drives.
        more: desks of the same run elsewhere.
    """
    over = threading.Event()
    desks = (Here(folder), *more)
    threads = [threading.Thread(target=_attend, args=(d, over), daemon=True) for d in desks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread, desk in zip(threads, desks, strict=True):
            thread.join(timeout=LOOK_S)
            with suppress(OSError, RaytuneError):
                desk.delete(REQUEST)
                if folder.run_json.is_file():
                    _beat(desk, over=True)
                else:  # nothing came of the run, and nothing is left of it
                    desk.delete(ALIVE)


@contextmanager
def end_kept(folder: RunFolder) -> Iterator[None]:
    """Write down the error that ends a run, if it had begun, where `raytune-ft logs` looks for it.

    To be entered inside of what sends the run's files elsewhere, and that inside of `attended`: a
    driver says that it has ended when all of it is there.
    """
    try:
        yield
    except RaytuneError as error:
        if folder.run_json.is_file():
            with suppress(OSError, RaytuneError):  # a full disk, which was told already
                _keep(folder, error)
        raise


def _keep(folder: RunFolder, error: RaytuneError) -> None:
    folder.update(ended={"words": str(error), "code": error.exit_code})
    with folder.lines.open("a", encoding="utf-8", errors="replace") as file:
        mark = "" if isinstance(error, Interrupted) else "error: "
        file.write(f"{mark}{error}\n")


def _attend(desk: Desk, over: threading.Event) -> None:
    own, beaten = liveness.this_process(), float("-inf")
    obeyed: dict[str, Any] | None = None
    while True:
        with suppress(OSError, RaytuneError):  # the next look may find disk and network well
            if time.monotonic() - beaten >= liveness.BEAT_S:
                _beat(desk, over=False)
                beaten = time.monotonic()
            request = _request(desk, own)
            if request is not None and request != obeyed and can_be_told():
                obeyed = request  # before it is deleted: a store that fails then has lost no word
                interrupt(own, now=bool(request.get("now")), over=over)
            if request is not None and request == obeyed:
                desk.delete(REQUEST)
                obeyed = None
        if over.wait(LOOK_S):
            return


def _beat(desk: Desk, *, over: bool) -> None:
    sign = {"driver": liveness.this_process(), "time": time.time(), "over": over}
    desk.write(ALIVE, json.dumps(sign).encode())


def _request(desk: Desk, own: dict[str, Any]) -> dict[str, Any] | None:
    try:
        content = json.loads(desk.read(REQUEST))
    except (FileNotFoundError, ValueError):
        return None
    mine = isinstance(content, dict) and content.get("driver") == own
    return content if mine else None


def can_be_told() -> bool:
    """Tell whether a Ctrl-C reaches this process yet; one begun by `&` in a script ignores it."""
    return signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def listens(process: dict[str, Any]) -> bool:
    """Tell whether a Ctrl-C reaches a process of this machine yet."""
    try:
        lines = Path(f"/proc/{int(process['pid'])}/status").read_text(encoding="utf-8")
    except OSError:
        return True
    ignored = next((line for line in lines.splitlines() if line.startswith("SigIgn:")), ": 0")
    return not int(ignored.partition(":")[2], 16) >> (signal.SIGINT - 1) & 1


def interrupt(process: dict[str, Any], *, now: bool, over: threading.Event) -> None:
    """Send a process the signals of a stop.

    Args:
        process: as `liveness.this_process` described it.
        now: whether it is not to wait for its checkpoint, and killed if it does not go.
        over: set when it has ended.

    Raises:
        ProcessLookupError: it has ended, or its number is another process's.
        PermissionError: it is another user's.
    """
    liveness.send(process, signal.SIGINT)
    if not now or over.wait(AGAIN_S):
        return
    with suppress(ProcessLookupError):
        liveness.send(process, signal.SIGINT)
        if not over.wait(KILL_S):
            liveness.send(process, signal.SIGKILL)
