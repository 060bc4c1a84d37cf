"""Waiting: a cluster's nodes in, a line out whenever a run waits for room, or need not any more.

Ray Train waits without a word for as long as a node is missing, be it lost or not started yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LOOK_S = 5.0
LOOKS = 2
"""One after the other that find the same before it is told: nodes come and go in turn."""
NOISE = 1e-6
"""Ray's books are in ten thousandths."""


@dataclass(frozen=True)
class Need:
    """What a run's workers take."""

    each: Mapping[str, float]
    """Resources of one worker, as Ray calls them."""
    least: int
    """Workers without which the run waits."""
    most: int
    """Workers that it can use."""


def room_for(nodes: Sequence[Mapping[str, Any]], each: Mapping[str, float]) -> int:
    """Return how many workers the nodes that are up can hold, whoever holds them just now.

    Args:
        nodes: as `ray.nodes()` gives them.
        each: resources of one worker.
    """
    found = 0
    for node in nodes:
        there = node["Resources"] if node["Alive"] else {}
        held = [there.get(name, 0.0) / amount + NOISE for name, amount in each.items() if amount]
        found += int(min(held, default=0.0))
    return found


def is_free(free: Mapping[str, float], each: Mapping[str, float]) -> bool:
    """Tell whether nobody holds what one more worker takes, of all nodes together."""
    return all(free.get(name, 0.0) + NOISE >= amount for name, amount in each.items())


def line(room: int, need: Need, before: int | None) -> str | None:
    """Return what to tell of the room that there is now; None: nothing.

    Args:
        room: for so many workers.
        need: of the run.
        before: what was told last; None: nothing yet, and there was enough.
    """
    if room < need.least:
        what = ", ".join(f"{amount:g} {name}" for name, amount in need.each.items() if amount)
        return (
            f"the cluster has room for {room} of {need.least} workers ({what} each); waiting for "
            "a node, or end this run and go on with fewer run.workers"
        )
    return "the cluster has room for the workers again" if before is not None else None


@contextmanager
def told_of_room(
    look: Callable[[], Sequence[Mapping[str, Any]]],
    free: Callable[[], Mapping[str, float]],
    need: Need,
    say: Callable[[str], object],
    told_room: Callable[[int], object] = lambda _: None,
    every_s: float = LOOK_S,
) -> Iterator[None]:
    """Tell while the block runs whether its workers have room, as often as that changes.

    Args:
        look: gives the nodes as `ray.nodes` does; may raise what Ray raises without its head.
        free: gives what nobody holds, as `ray.available_resources` does.
        need: of the run.
        say: tells a line.
        told_room: gets with every look for how many of `need.most` there is room; 0 where nothing
            is free for one more.
        every_s: seconds between two looks.
    """
    over = threading.Event()

    def watch() -> None:
        told: int | None = None
        seen, looks = -1, 0
        while not over.wait(every_s):
            try:
                room, left = room_for(look(), need.each), free()
            except Exception:  # noqa: S112, the head is away: Ray's own errors differ by the moment
                continue
            seen, looks = room, looks + 1 if room == seen else 1
            if looks < LOOKS:
                continue
            told_room(min(room, need.most) if is_free(left, need.each) else 0)
            if looks > LOOKS or room == told:
                continue
            if (text := line(room, need, told)) is not None:
                say(text)
            told = room if room < need.least else None

    threading.Thread(target=watch, name="room", daemon=True).start()
    try:
        yield
    finally:
        over.set()
