"""Engines: many requests in, streams of answer pieces out.

`ChatEngine` is what the endpoint needs; `EmbeddedEngine` answers from a ChatModel in its own
process, one request after the other in one worker thread. An engine with continuous batching
takes its place behind the same interface. No ray.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raytune_ft.chat.history import Message
from raytune_ft.chat.model import ChatModel, Piece, Sampling
from raytune_ft.errors import RaytuneError, ServeError

logger = logging.getLogger(__name__)

Outcome = Piece | BaseException | None
"""What the worker hands over: a piece, the error that ended the answer, or None at its end."""


class EngineBusyError(RaytuneError):
    """As many requests wait as may wait; come again later."""


class PieceStream:
    """The pieces of one answer; closing or dropping it ends the generation.

    No async generator: the `finally` of one that was never started does not run.
    """

    def __init__(self, out: asyncio.Queue[Outcome], cancel: Callable[[], None]) -> None:
        self._out, self._cancel = out, cancel
        self._ended = False

    def __aiter__(self) -> PieceStream:
        return self

    async def __anext__(self) -> Piece:
        outcome = None if self._ended else await self._out.get()
        if isinstance(outcome, Piece):
            return outcome
        self._ended = True
        raise StopAsyncIteration if outcome is None else outcome

    async def aclose(self) -> None:
        """End the generation within one token; later pieces are lost."""
        self._ended = True
        self._cancel()

    def __del__(self) -> None:
        self._cancel()


class ChatEngine(ABC):
    """What the endpoint needs of whatever generates the text."""

    name: str
    """The model's id."""
    context: int
    """Tokens of prompt and answer together."""

    @abstractmethod
    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's ids; DataError if the template cannot render the messages."""

    @abstractmethod
    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> PieceStream:
        """Take a request, or raise EngineBusyError at once; needs a running event loop."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether requests are still being answered."""

    @abstractmethod
    def close(self) -> None:
        """Stop answering; waiting requests end with ServeError."""


@dataclass(eq=False)
class Job:
    """One request on its way through the engine."""

    prompt_ids: list[int]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Outcome]
    cancelled: threading.Event

    def put(self, outcome: Outcome) -> None:
        """Hand an outcome to the reader's event loop; a closed loop has no reader left."""
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, outcome)
        except RuntimeError:
            self.cancelled.set()


class EmbeddedEngine(ChatEngine):
    """Answers from a ChatModel, one request after the other.

    Args:
        chat: the loaded model.
        max_waiting: requests that may wait beside the one being answered.
    """

    def __init__(self, chat: ChatModel, max_waiting: int = 16) -> None:
        self.name, self.context = chat.name, chat.context
        self._chat, self._max_waiting = chat, max_waiting
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="generate", daemon=True)
        self._worker.start()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's ids, by the function that training used."""
        return self._chat.encode(messages)

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> PieceStream:
        """Put a request at the end of the queue."""
        loop = asyncio.get_running_loop()
        job = Job(list(prompt_ids), sampling, loop, asyncio.Queue(), threading.Event())
        with self._changed:
            if self._closed:
                raise ServeError("the endpoint is shutting down")
            if len(self._waiting) + (self._current is not None) > self._max_waiting:
                raise EngineBusyError(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return PieceStream(job.out, lambda: self._cancel(job))

    def healthy(self) -> bool:
        """Whether the worker thread lives."""
        return self._worker.is_alive() and not self._closed

    @property
    def in_use(self) -> int:
        """Requests waiting or being answered."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def close(self) -> None:
        """End the answer being generated and refuse all that wait."""
        with self._changed:
            self._closed = True
            dropped = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in dropped:
            job.cancelled.set()
            job.put(ServeError("the endpoint is shutting down"))
        self._worker.join(timeout=30)

    def _cancel(self, job: Job) -> None:
        """Free the job's place at once when it waits, within one token when it runs."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            except Exception as error:  # reported to the request; the next one is answered
                logger.exception("an answer failed")
                job.put(error)
            finally:
                with self._changed:
                    self._current = None

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, job: Job) -> None:
        for piece in self._chat.pieces(job.prompt_ids, job.sampling, job.cancelled.is_set):
            job.put(piece)
            if job.cancelled.is_set():
                break
        job.put(None)
