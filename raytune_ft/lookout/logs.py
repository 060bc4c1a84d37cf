"""Logs: a run in, what it says for people out, to its end if that is wanted.

A driver keeps the lines that it shows in `lines.log`. A run that has none, as a sweep's trial, is
told by its steps. A line of the run's end goes to stderr, the lines themselves to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator

from raytune_ft.errors import CheckpointError, Interrupted, RaytuneError, TrainingError
from raytune_ft.lookout.seen import SIGNS, Seen, find, look_at
from raytune_ft.lookout.tail import Tail, clean

HERE_S, ELSEWHERE_S = 0.5, 3.0
"""Between two looks at a run that goes on."""
PATIENCE_S = 120.0
"""For a store elsewhere that fails, before that ends the following."""
LINES, STEPS, NOISE = "lines.log", "metrics.jsonl", "run.log"
Shown = Callable[[str], str | None]
"""A line of a file to what is printed of it."""


def show(word: str, name: str, *, follow: bool, last: int | None) -> int:
    """Print a run's lines; return the exit code.

    Args:
        word: what the user calls the run.
        name: `LINES`, or another file of the run that is to be shown as it is.
        follow: until the run ends; one that is not there yet is waited for.
        last: lines to begin with; None: all.

    Returns:
        0; with `follow` the run's own exit code: 75 where it was stopped or interrupted.

    Raises:
        CheckpointError: there is no such run, or it went away before it began.
    """
    if not follow:
        seen = find(word)
        tail, shown = _opened(seen, name, last)
        _print(tail, shown)
        _print_rest(tail, shown)
        return 0
    seen = _arrived(word)
    _follow(seen, name, last)
    return _ended(seen, name)


def _arrived(word: str) -> Seen:
    """Wait until there is a run."""
    seen, told = look_at(word), False
    while not seen.is_there():
        if not told:
            told = True
            _tell(f"{seen.shown}: not there yet; waiting for it (Ctrl-C ends that)")
        time.sleep(_pause(seen))
        seen = look_at(word)
    return seen


def _opened(seen: Seen, name: str, last: int | None) -> tuple[Tail, Shown]:
    """Choose what is read, and how its lines are printed."""
    if name == LINES and seen.files.stamp(LINES) is None and seen.files.stamp(STEPS) is not None:
        return Tail(seen.files, STEPS, last), step_words
    return Tail(seen.files, name, last), clean


def step_words(line: str) -> str | None:
    """Write a line of metrics.jsonl as the screen does; None where it is damaged."""
    from raytune_ft.screen import step_line

    try:
        return clean(step_line(json.loads(line)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _follow(seen: Seen, name: str, last: int | None) -> None:
    """Print lines until nobody drives the run any more."""
    failing_since: float | None = None
    tail, shown = _opened(seen, name, last)
    while True:
        try:
            driver = seen.driver()  # first: what it wrote until then is read behind that
            cuts = tail.n_cuts
            if not tail.has_begun:  # either file may come first
                tail, shown = _opened(seen, name, last)
            _print(tail, shown)
        except CheckpointError:
            failing_since = failing_since or time.monotonic()
            if not seen.is_elsewhere or time.monotonic() - failing_since > PATIENCE_S:
                raise
        else:
            failing_since = None
            if tail.n_cuts > cuts:
                _tell(f"{seen.shown}: was taken up again from an earlier step")
            if driver is None:
                _print_rest(tail, shown)
                return
        time.sleep(_pause(seen))


def _ended(seen: Seen, name: str) -> int:
    """Say how a run ended; return its exit code."""
    info, status = seen.info(), seen.status()
    if not any(seen.files.stamp(one) is not None for one in SIGNS):
        raise CheckpointError(f"{seen.shown}: it ended before it began, and nothing is left of it")
    if status == "done":
        return 0
    ended = info.get("ended")
    words, code = "", None
    if isinstance(ended, dict) and status in ("failed", "stopped"):
        words, code = clean(str(ended.get("words", ""))), ended.get("code")
    told = name == LINES and seen.files.stamp(LINES) is not None
    reason = f": {words}" if words and not told else ""
    if status == "failed":
        _tell(f"{seen.shown}: failed{reason}; {seen.how_to_go_on()}")
        return code if isinstance(code, int) and 0 < code < 128 else TrainingError.exit_code
    if status == "damaged":
        _tell(f"{seen.shown}: damaged: it has no run.json that can be read")
        return RaytuneError.exit_code
    gone = " (its driver is gone)" if status == "interrupted" else reason
    _tell(f"{seen.shown}: {status}{gone}; {seen.how_to_go_on()}")
    return Interrupted.exit_code


def _print(tail: Tail, shown: Shown) -> None:
    for line in tail.new():
        _say(shown(line))
    sys.stdout.flush()


def _print_rest(tail: Tail, shown: Shown) -> None:
    for line in _parts(tail.rest()):
        _say(shown(line))
    sys.stdout.flush()


def _parts(rest: str) -> Iterator[str]:
    if rest:
        yield rest


def _say(words: str | None) -> None:
    if words is not None:
        print(words)


def _pause(seen: Seen) -> float:
    return ELSEWHERE_S if seen.is_elsewhere else HERE_S


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
