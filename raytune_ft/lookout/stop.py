"""Stop: a run that is driven somewhere in, one that ended behind its checkpoint out.

A driver of this machine gets a signal; one elsewhere finds a request in the run's files. Both stop
as Ctrl-C would stop them: behind the step and its checkpoint, or at once. A sweep's driver stops
its trials.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

from raytune_ft.errors import CheckpointError, Interrupted, RecipeError
from raytune_ft.lookout.logs import ELSEWHERE_S, HERE_S
from raytune_ft.lookout.seen import TRIALS, Seen, find
from raytune_ft.training.guarding import attending, liveness

NOTHING_TO_DO = 1
"""Exit code where nobody drove the run."""
STILL_THERE = Interrupted.exit_code
"""Exit code where it had not stopped in time; 75 is sysexits.h's "try again"."""


def stop(word: str, *, now: bool, wait_s: float | None) -> int:
    """Have a run stopped, wait for it, say how to go on; return the exit code.

    Args:
        word: what the user calls the run.
        now: whether its last checkpoint is enough.
        wait_s: seconds to wait until it has ended; None: as long as it takes.

    Returns:
        0: it has ended. 1: nobody drove it. 75: it had not ended in time, the request stands.

    Raises:
        CheckpointError: there is no such run, or the request cannot be written.
        RecipeError: it is a trial of a sweep.
    """
    seen = find(word)
    _check_whole(seen)
    driver = seen.driver()
    if driver is None:
        _tell(f"{seen.shown}: nothing to stop: {_state(seen)}")
        return NOTHING_TO_DO
    over = Over(seen, driver)
    _tell(f"{seen.shown}: {_asked(seen, driver, over, now=now)}")
    if over.wait(wait_s):
        _tell(f"{seen.shown}: {_state(seen)}")
        return 0
    _tell(f"{seen.shown}: still goes on; it stops as soon as it can: raytune-ft logs -f {word}")
    return STILL_THERE


class Over(threading.Event):
    """Is set when a driver has ended."""

    def __init__(self, seen: Seen, driver: dict[str, Any]) -> None:
        super().__init__()
        self.seen, self.driver = seen, driver

    def wait(self, timeout: float | None = None) -> bool:
        """Look again and again, for so many seconds or as long as it takes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = ELSEWHERE_S if self.seen.is_elsewhere else HERE_S / 2
        while not self._look():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            left = pause if deadline is None else deadline - time.monotonic()
            time.sleep(max(0.0, min(pause, left)))
        return True

    def _look(self) -> bool:
        if self.driver and liveness.can_be_seen(self.driver):
            return liveness.is_gone(self.driver)
        return self.seen.driver() != self.driver


def _check_whole(seen: Seen) -> None:
    place, _, name = seen.shown.rstrip("/").rpartition("/")
    sweep, _, parent = place.rpartition("/")
    if parent == TRIALS and name and sweep:
        raise RecipeError(
            f"{seen.shown}: a trial is stopped with its sweep: raytune-ft stop {sweep}"
        )


def _asked(seen: Seen, driver: dict[str, Any], over: Over, *, now: bool) -> str:
    """Ask the driver to end; return what was done, in words."""
    how = "at once" if now else "behind its step's checkpoint"
    if driver and liveness.can_be_seen(driver) and attending.listens(driver):
        with suppress(PermissionError):  # another user's, whose folder may be writable all the same
            try:
                attending.interrupt(driver, now=now, over=over)
            except ProcessLookupError:
                return "it ended meanwhile"
            return f"process {driver['pid']} was asked to stop {how}"
    if not driver:
        raise CheckpointError(
            f"{seen.shown}: run.json does not say which process drives it; end that by hand"
        )
    try:
        attending.ask(seen.files, driver, now=now)
    except OSError as error:
        raise CheckpointError(
            f"{seen.shown}: process {driver['pid']} on {driver['host']} drives it, and no request "
            f"can be left there: {error.strerror}"
        ) from None
    return f"process {driver['pid']} on {driver['host']} is asked to stop {how}"


def _state(seen: Seen) -> str:
    """Say what a run is that nobody drives, and how it goes on."""
    if not seen.is_there():
        return "it had not begun, and nothing is left of it"
    status = seen.status()
    if status == "done":
        return "it is done"
    if status == "interrupted":
        return f"interrupted, its driver is gone; {seen.how_to_go_on()}"
    if status == "damaged":
        return "damaged: it has no run.json that can be read"
    return f"{status}; {seen.how_to_go_on()}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
