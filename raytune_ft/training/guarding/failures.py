"""Failures: an error of a worker in, whether the run is started again out; `failures.jsonl`.

Ray Train starts all workers again where one raises or dies. What would only come again ends the
run instead: a mistake of the user, and a failure that was seen before at the same step. A worker
writes it down; the driver reads it and raises it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raytune_ft import errors
from raytune_ft.training.guarding.pulse import PULSE
from raytune_ft.training.guarding.watchdog import FOLDER, forget
from raytune_ft.training.run_folder import Event, RunFolder, append_jsonl, read_jsonl

FILE = "failures.jsonl"
HANG = "hang"
KILLED = "killed"


Listener = Callable[[Event], object]
_listeners: list[Listener] = []
"""Of this process, which is one rank."""


class Elsewhere(errors.TrainingError):
    """Another rank cannot go on, and tells why itself."""


class Retry(Exception):  # noqa: N818, what is raised is the wish
    """All workers have to be started again; what they do otherwise then is written down already."""


class Grow(Exception):  # noqa: N818, as `Retry`
    """There is room for more workers, and a checkpoint for them to go on from."""


def begin(folder: RunFolder) -> None:
    """Forget what an earlier driver of the run met; workers find the file there."""
    forget(folder.path / FOLDER)
    (folder.path / FILE).write_text("", encoding="utf-8")


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """While the block runs, have whatever this process writes down told elsewhere as well.

    For a rank on a machine that does not have the run's folder.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def guard(work: Callable[[], object], folder: RunFolder, rank: int) -> None:
    """Do a rank's work; raise only what another start may mend."""
    try:
        work()
    except Elsewhere:
        traceback.print_exc()
    except errors.RaytuneError as error:
        _write(folder, {"words": str(error), "type": type(error).__name__, "fatal": True}, rank)
        traceback.print_exc()
    except (Retry, Grow):
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {last_line(error)}"
        traceback.print_exc()
        if not note(folder, words, rank=rank):
            raise


def note(folder: RunFolder, words: str, *, rank: int, kind: str = "", again: str = "") -> bool:
    """Write down a failure at this process's step; return whether it ends the run.

    Ranks that fail together are one failure: each looks for its own earlier ones alone.

    Args:
        folder: of the run.
        words: one line.
        rank: that writes.
        kind: failures of a kind are the same whatever rank and words; ranks of several machines
            may each tell of one.
        again: line that ends the run, where it is not `words`.
    """
    seen = list(read_jsonl(folder.path / FILE))
    fatal = any(
        e["step"] == PULSE.step
        and (_is_again(e, kind) if kind else (e["words"], e["rank"]) == (words, rank))
        for e in seen
    )
    line = f"step {PULSE.step}: the same failure twice: {words}"
    _write(
        folder,
        {
            "words": (again or line) if fatal else words, "type": "TrainingError", "kind": kind,
            "fatal": fatal,
        },
        rank,
    )  # fmt: skip
    return fatal


def _is_again(entry: Event, kind: str) -> bool:
    return bool(entry["kind"] == kind and entry["attempt"] != PULSE.attempt)


def mention(folder: RunFolder, words: str) -> None:
    """Write down what may happen again without meaning anything: a process was killed."""
    _write(folder, {"words": words, "type": "TrainingError", "fatal": False}, 0)


def last(folder: RunFolder) -> Event | None:
    """Return what was written last, if anything."""
    entries = list(read_jsonl(folder.path / FILE))
    return entries[-1] if entries else None


def fatal(folder: RunFolder) -> errors.RaytuneError | None:
    """Return the error that ends the run, if one was written down."""
    for entry in read_jsonl(folder.path / FILE):
        if entry["fatal"]:
            kind = getattr(errors, entry["type"], errors.TrainingError)
            error: errors.RaytuneError = kind(entry["words"])
            return error
    return None


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where nested tracebacks end with the cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _write(folder: RunFolder, entry: Event, rank: int) -> None:
    where = {"rank": rank, "step": PULSE.step, "attempt": PULSE.attempt}
    whole = {"kind": "", **entry, **where}
    append_jsonl(folder.path / FILE, whole)
    for listener in _listeners:
        listener(whole)
