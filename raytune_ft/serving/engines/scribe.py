"""The scribe: tokens of many answers in, pieces out to whoever reads them, in a thread of its own.

Turning tokens into text takes longer than choosing them, so the thread that computes only hands
over ids, a batch at a time. Readers are asyncio queues on some event loop, and each loop is woken
once per batch.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from raytune_ft.chat.model import Sampling
from raytune_ft.chat.writing import Finish, Writing
from raytune_ft.model.sampling import Draw, Told
from raytune_ft.serving.engine import Outcome

logger = logging.getLogger(__name__)

Delivery = tuple["asyncio.Queue[Outcome]", Outcome]


@dataclass(eq=False)
class Answer:
    """One request on its way through an engine."""

    model: str
    prompt: list[int]
    sampling: Sampling
    limit: int
    """Tokens of the answer at most."""
    stop_ids: frozenset[int]
    writing: Writing
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Nobody reads on, or a stop string ended it: its place may go to another request."""
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    """The reader has the last outcome; the scribe's alone."""

    def __post_init__(self) -> None:
        self.draw = Draw(self.sampling)


@dataclass(frozen=True)
class Event:
    """What happened to an answer: a token, its end, or both."""

    answer: Answer
    token: int | None = None
    told: Told | None = None
    end: Finish | BaseException | None = None


class Scribe:
    """Writes answers until it is closed."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="scribe", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event]) -> None:
        """Take what one pass gave."""
        if events:
            self._events.put(events)

    def alive(self) -> bool:
        """Whether answers are still written."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Write what is there and stop."""
        self._events.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (events := self._events.get()) is not None:
            by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
            for event in events:
                outcomes = _outcomes(event)
                if outcomes:
                    mine = by_loop.setdefault(event.answer.loop, [])
                    mine += [(event.answer.out, outcome) for outcome in outcomes]
            for loop, deliveries in by_loop.items():
                _deliver(loop, deliveries)


def _outcomes(event: Event) -> list[Outcome]:
    """Return what an event means to the reader."""
    answer = event.answer
    if answer.ended:
        return []
    try:
        outcomes = _written(answer, event)
    except Exception as error:  # reported to its reader; other answers go on
        logger.exception("an answer could not be written")
        outcomes = [error]
    if outcomes and not _is_piece(outcomes[-1]):
        answer.ended = True
        answer.cancelled.set()
    return outcomes


def _written(answer: Answer, event: Event) -> list[Outcome]:
    outcomes: list[Outcome] = []
    if event.token is not None:
        piece = answer.writing.push(event.token, event.told)
        outcomes.append(piece)
        if piece.finish is not None:
            return [piece, None]
    if isinstance(event.end, BaseException):
        outcomes.append(event.end)
    elif event.end is not None:
        outcomes += [answer.writing.end(event.end), None]
    return outcomes


def _is_piece(outcome: Outcome) -> bool:
    return outcome is not None and not isinstance(outcome, BaseException)


def _deliver(loop: asyncio.AbstractEventLoop, deliveries: list[Delivery]) -> None:
    def put() -> None:
        for out, outcome in deliveries:
            out.put_nowait(outcome)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed: no reader is left, and each stream's end says so
        logger.debug("an event loop is gone")
