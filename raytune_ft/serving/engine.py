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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Load:
    """What an engine has to do at a moment."""

    running: int
    """Requests that are being answered."""
    waiting: int
    slots: int
    """Requests that can be answered at a time."""
    cached_tokens: int = 0
    """Tokens of prompts since the start whose keys and values were there already."""
    kv_used: float = 0.0
    """Share of the memory for keys and values that is taken, 0 to 1."""


class ChatEngine(ABC):
    """What the endpoint needs of whatever generates the text."""

    name: str
    """The id of the first model."""
    context: int
    """Tokens of prompt and answer together."""

    def models(self) -> tuple[str, ...]:
        """Return the ids that requests may name, the default one first.

        Adapters are among them whether they are loaded or could be.
        """
        return (self.name,)

    @abstractmethod
    def encode(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the prompt's ids; DataError if the template cannot render the messages."""

    def encode_text(self, text: str) -> list[int]:
        """Return a plain text's ids as training on plain text has them: one BOS in front."""
        raise ServeError(f"{self.name}: this engine continues conversations, not plain text")

    def thought(self, prompt_ids: Sequence[int], *, model: str | None = None) -> bool | None:
        """Whether a prompt ends inside a thought; None: the model's template knows none."""
        return None

    @abstractmethod
    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: str | None = None
    ) -> PieceStream:
        """Take a request, or raise EngineBusyError at once; needs a running event loop.

        Args:
            prompt_ids: what `encode` or `encode_text` gave.
            sampling: how the answer is drawn.
            model: one of `models()`; none: the first.
        """

    @abstractmethod
    def healthy(self) -> bool:
        """Whether requests are still being answered."""

    def ready(self) -> bool:
        """Whether the weights are there, so that a request would be answered now."""
        return self.healthy()

    def load(self) -> Load:
        """Return what there is to do now."""
        return Load(running=0, waiting=0, slots=1)

    @abstractmethod
    def close(self) -> None:
        """Stop answering; running and waiting requests end with ServeError."""


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

    def encode(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the prompt's ids, by the function that training used."""
        return self._chat.encode(messages, tools or ())

    def encode_text(self, text: str) -> list[int]:
        """Return a plain text's ids."""
        return self._chat.encode_text(text)

    def thought(self, prompt_ids: Sequence[int], *, model: str | None = None) -> bool | None:
        """Whether a prompt ends inside a thought."""
        return self._chat.thought(prompt_ids)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: str | None = None
    ) -> PieceStream:
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

    def load(self) -> Load:
        """Return what there is to do now."""
        with self._changed:
            return Load(int(self._current is not None), len(self._waiting), slots=1)

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
