"""Continuous batching: requests join and leave a running batch between two tokens.

Why this is ours and not transformers' manager (5.23, `generation.continuous_batching`): it draws
from one random state for all requests, so that a seed's answer depends on who else is there; its
chances are those behind temperature and cuts; a request has no penalties; an error in one pass
ends its thread and with it every request; there are no adapters; and without the flash-attention
package every token attends to the whole batch's keys under a mask, with no CUDA graph. What is
used of the library is what a row needs: each model's own attention, caches, masks of prompts.

One thread computes. Each round it drops requests that nobody reads, runs waiting prompts, several
in a pass or a part of a long one, and one token of each lane (`model.lanes`); text is written by
another thread (`scribe`).

Rows of a lane share their model, so requests of several adapters take turns lane by lane. An
answer's token depends on its own prompt, rule and seed; rows side by side differ from rows alone
by the rounding of float sums (1e-6 to 5e-4 of the logits' spread in float32; `lanes.probed` checks
the model at hand), so answers can differ only where two tokens are that close.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.chat.history import Message
from raytune_ft.chat.model import ChatModel, Sampling
from raytune_ft.chat.writing import Writing
from raytune_ft.model import lanes
from raytune_ft.model.generate import device_of
from raytune_ft.serving.engine import ChatEngine, Load, PieceStream
from raytune_ft.serving.engines.desk import Desk
from raytune_ft.serving.engines.memory import Memory
from raytune_ft.serving.engines.models import Models
from raytune_ft.serving.engines.rounds import Rounds
from raytune_ft.serving.engines.scribe import Answer, Scribe

logger = logging.getLogger(__name__)

SLOTS = {"cpu": 64, "cuda": 256}
"""Requests that are answered at a time."""
FAILURES = 8
"""Passes in a row that may fail before the engine counts as broken, and its replica is replaced."""


class BatchedEngine(ChatEngine):
    """Answers many requests side by side from one base and its adapters."""

    def __init__(
        self,
        chat: ChatModel,
        max_waiting: int = 16,
        *,
        slots: int | None = None,
        kv_gib: float | None = None,
        adapters: str | None = None,
        max_adapters: int = 4,
    ) -> None:
        """Take a loaded model.

        Args:
            chat: the model.
            max_waiting: requests that may wait when all slots are taken.
            slots: requests answered at a time; none: by the device.
            kv_gib: GiB for keys and values; none: by what is free.
            adapters: folder of adapters that are served by their names.
            max_adapters: of those in memory at once.

        Raises:
            NotBatchedError: this model cannot be batched.
            ServeError: `adapters` is no folder.
        """
        self.name, self.context = chat.name, chat.context
        self._models = Models(chat, adapters, max_adapters)
        place = device_of(chat.model).type
        slots = slots or SLOTS.get(place, SLOTS["cpu"])
        self._memory = Memory(lanes.probed(chat.model), self.context, slots, kv_gib)
        self._desk, self._scribe = Desk(slots, max_waiting), Scribe()
        self._rounds = Rounds(self._desk, self._models, self._memory, self._scribe)
        self._worker = threading.Thread(target=self._rounds.work, name="generate", daemon=True)
        self._worker.start()

    def models(self) -> tuple[str, ...]:
        """Return the ids that requests may name."""
        return self._models.names()

    def encode(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the prompt's ids, by the template that the model was trained with."""
        return self._models.chat(model).encode(messages, tools or ())

    def encode_text(self, text: str) -> list[int]:
        """Return a plain text's ids."""
        return self._models.chat(None).encode_text(text)

    def thought(self, prompt_ids: Sequence[int], *, model: str | None = None) -> bool | None:
        """Whether a prompt ends inside a thought."""
        return self._models.chat(model).thought(prompt_ids)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: str | None = None
    ) -> PieceStream:
        """Put a request at the end of the queue."""
        chat = self._models.chat(model)
        prompt = list(prompt_ids)
        answer = Answer(
            model=chat.name,
            prompt=prompt,
            sampling=sampling,
            limit=min(sampling.max_new_tokens, self.context - len(prompt)),
            stop_ids=chat.stop_ids,
            writing=Writing(chat.tokenizer, sampling.stop),
            loop=asyncio.get_running_loop(),
        )
        self._desk.hand_in(answer)
        return PieceStream(answer.out, lambda: self._desk.cancel(answer))

    def healthy(self) -> bool:
        """Whether the threads live and requests are not failing one after the other."""
        alive = self._worker.is_alive() and self._scribe.alive() and not self._desk.closed
        return alive and self._rounds.failures < FAILURES

    def load(self) -> Load:
        """Return what there is to do now."""
        running, waiting = self._desk.counts()
        return Load(
            running=running,
            waiting=waiting,
            slots=self._desk.slots,
            cached_tokens=self._rounds.cached_tokens,
            kv_used=self._memory.used,
        )

    @property
    def in_use(self) -> int:
        """Requests waiting or being answered."""
        return sum(self._desk.counts())

    def close(self) -> None:
        """End all answers, refuse all that wait, and give the memory for keys and values back."""
        self._desk.close()
        self._worker.join(timeout=60)
        self._scribe.close()
        if not self._worker.is_alive():
            self._memory.spare()
