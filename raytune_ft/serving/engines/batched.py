"""Continuous batching: requests join and leave a running batch between two tokens.

Why this is ours and not transformers' manager, which was read and tried first (5.23): it draws
from one random state for all requests, so that a seed's answer depends on who else is there; its
chances are those behind temperature and cuts; a request has no penalties; an error in one pass
ends its thread and with it every request; there are no adapters; and without the flash-attention
package every token attends to the whole batch's keys under a mask, with no CUDA graph. What is
used of it is what one row needs: the growing cache, masks of prompts, every model's own attention.

One thread computes. Each round it drops requests that nobody reads, runs waiting prompts, several
in a pass or a part of a long one, and one token of each lane (`model.lanes`); text is written by
another thread (`scribe`).
Rows of a lane share their model, so requests of several adapters take turns lane by lane. An
answer's token depends on its own prompt, rule and seed; rows side by side differ from rows alone
by the rounding of float sums (up to 1e-4 of the largest logit in float32, which `lanes.probed`
checks on the model at hand), so answers can differ only where two tokens are that close.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from raytune_ft.chat.history import Message
from raytune_ft.chat.model import ChatModel, Sampling
from raytune_ft.chat.writing import Finish, Writing
from raytune_ft.errors import ServeError
from raytune_ft.model import lanes
from raytune_ft.model.generate import device_of, room_for
from raytune_ft.model.lanes import Kept, Lane
from raytune_ft.model.sampling import Chooser
from raytune_ft.serving.engine import ChatEngine, EngineBusyError, Load, PieceStream
from raytune_ft.serving.engines.memory import Memory
from raytune_ft.serving.engines.models import Models
from raytune_ft.serving.engines.scribe import Answer, Event, Scribe

logger = logging.getLogger(__name__)

SLOTS = {"cpu": 64, "cuda": 256}
"""Requests that are answered at a time."""
PROMPT_PART = {"cpu": 256, "cuda": 2048}
"""Tokens of prompts between two tokens of the answers that are under way."""
PROMPTS_AT_ONCE = 16
CLOSING = "the endpoint is shutting down"


@dataclass(eq=False)
class _Group:
    """The answers of one lane, in the order of its rows."""

    model: str
    lane: Lane
    rows: list[Answer] = field(default_factory=list)
    chooser: Chooser | None = None


@dataclass(frozen=True)
class _Begun:
    """A request with a promised row, and what is known of its prompt."""

    answer: Answer
    lane: Lane
    kept: Kept
    known: int

    @property
    def rest(self) -> list[int]:
        """The prompt's tokens that are to be run."""
        return self.answer.prompt[self.known :]


@dataclass(eq=False)
class _Long:
    """A prompt that is run in parts."""

    begun: _Begun
    cache: DynamicCache
    done: int


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
        self._device = device_of(chat.model)
        self._words: int = chat.model.get_input_embeddings().weight.shape[0]
        self._slots = slots or SLOTS.get(self._device.type, SLOTS["cpu"])
        like = lanes.probed(chat.model)
        self._memory = Memory(like, self.context, self._slots, kv_gib)
        self._part = PROMPT_PART.get(self._device.type, PROMPT_PART["cpu"])
        self._max_waiting = max_waiting
        self._waiting: deque[Answer] = deque()
        self._groups: dict[int, _Group] = {}
        self._long: _Long | None = None
        self._running = 0
        self._cached_tokens = 0
        self._closed = False
        self._changed = threading.Condition()
        self._scribe = Scribe()
        self._worker = threading.Thread(target=self._work, name="generate", daemon=True)
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
        with self._changed:
            if self._closed:
                raise ServeError(CLOSING)
            free = max(self._slots - self._running, 0)
            if len(self._waiting) >= self._max_waiting + free:
                raise EngineBusyError(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append(answer)
            self._changed.notify()
        return PieceStream(answer.out, lambda: self._cancel(answer))

    def healthy(self) -> bool:
        """Whether the threads live."""
        return self._worker.is_alive() and self._scribe.alive() and not self._closed

    def load(self) -> Load:
        """Return what there is to do now."""
        with self._changed:
            return Load(
                running=self._running,
                waiting=len(self._waiting),
                slots=self._slots,
                cached_tokens=self._cached_tokens,
                kv_used=self._memory.used,
            )

    @property
    def in_use(self) -> int:
        """Requests waiting or being answered."""
        with self._changed:
            return len(self._waiting) + self._running

    def close(self) -> None:
        """End all answers and refuse all that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join(timeout=60)
        self._scribe.close()

    def _cancel(self, answer: Answer) -> None:
        """Free the place at once when it waits, within one round when it runs."""
        answer.cancelled.set()
        with self._changed:
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._changed.notify()

    # -- the thread that computes ------------------------------------------------------------

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # not inference_mode: bitsandbytes keeps what it makes
        with torch.no_grad():
            while self._has_work():
                try:
                    self._round()
                except Exception as error:  # an error of ours; what runs now is lost, no more
                    logger.exception("a round failed")
                    self._fail_all(error)
        self._fail_all(ServeError(CLOSING))

    def _has_work(self) -> bool:
        """Wait for something to do; return False at the end."""
        with self._changed:
            while not (self._closed or self._running or self._waiting):
                self._changed.wait()
            return not self._closed

    def _round(self) -> None:
        self._sweep()
        if self._long is None:
            for batch in self._begin():
                self._run(batch)
        if self._long is not None:
            self._run_part(self._long)
        for group in list(self._groups.values()):
            self._advance(group)
        if self._running == 0:
            self._rest()

    def _rest(self) -> None:
        """Wait a moment where requests wait for what only others can give back."""
        with self._changed:
            if self._waiting and not self._closed:
                self._changed.wait(timeout=0.05)

    def _sweep(self) -> None:
        """Let requests go that nobody reads any more."""
        if self._long is not None and self._long.begun.answer.cancelled.is_set():
            self._drop_long()
        for group in self._groups.values():
            gone = [i for i, answer in enumerate(group.rows) if answer.cancelled.is_set()]
            self._leave(group, gone)
        # one without rows would keep a lane that memory may have let go
        self._groups = {key: group for key, group in self._groups.items() if group.rows}

    def _begin(self) -> list[list[_Begun]]:
        """Take waiting requests that can begin now, as many as one round may run, lane by lane."""
        batches: dict[int, list[_Begun]] = {}
        widest = count = 0
        with self._changed:
            waiting = list(self._waiting)
        for answer in waiting:
            if count == PROMPTS_AT_ONCE or self._running >= self._slots:
                break
            try:
                kept, known = self._memory.prefixes.find(answer.model, answer.prompt)
                rest = len(answer.prompt) - known
                if count and (count + 1) * max(widest, rest) > self._part:
                    break
                begun = self._placed(answer, kept, known)
            except Exception as error:  # of this request's prompt, size or adapter
                if self._taken(answer):
                    self._left(answer, error)
                continue
            if begun is None:
                continue
            if rest > self._part:
                self._long = _Long(begun, lanes.growing(kept, known), known)
                break
            batches.setdefault(id(begun.lane), []).append(begun)
            widest, count = max(widest, rest), count + 1
        return list(batches.values())

    def _placed(self, answer: Answer, kept: Kept, known: int) -> _Begun | None:
        """Give a request a row; None while it must wait."""
        if answer.limit <= 0:
            if self._taken(answer):
                self._left(answer, "length")
            return None
        room_for(self._models.model, len(answer.prompt))
        if not 0 <= min(answer.prompt) <= max(answer.prompt) < self._words:
            raise ServeError(f"prompt: ids are 0 to {self._words - 1}")  # a GPU would not recover
        need = len(answer.prompt) + answer.limit
        if not self._memory.fits_ever(need):
            raise ServeError(
                f"{need} tokens of prompt and answer: there is memory for {self._memory.tokens}; "
                "ask for fewer"
            )
        if not self._loaded(answer.model):
            return None
        lane = self._memory.place(answer.model, self._models.model, need)
        if lane is None:
            return None
        if not self._taken(answer):
            self._memory.settle(lane)
            return None
        self._cached_tokens += known
        answer.writing.n_cached = known
        return _Begun(answer, lane, kept, known)

    def _loaded(self, model: str) -> bool:
        """Have an adapter in memory; False while all that are there are in use."""
        if self._models.is_loaded(model):
            return True
        in_use = {group.model for group in self._groups.values()}
        if self._long is not None:
            in_use.add(self._long.begun.answer.model)
        in_use |= {owner for owner, lane in self._memory.lanes if self._memory.is_promised(lane)}
        if not self._models.room(in_use):
            return False
        gone = self._models.load(model, in_use)
        if gone is not None:
            self._memory.forget(gone)
        return True

    def _taken(self, answer: Answer) -> bool:
        """Move a request from the queue among those that run; False if it is gone."""
        with self._changed:
            if answer not in self._waiting:
                return False
            self._waiting.remove(answer)
            self._running += 1
            return True

    def _run(self, batch: list[_Begun]) -> None:
        """Run whole prompts of one lane; where that fails, each on its own."""
        lane, before = batch[0].lane, len(batch[0].lane.lengths)
        try:
            self._models.use(batch[0].answer.model)
            for begun in batch:
                lane.join(begun.kept, begun.known)
            logits = self._retried(lambda: lane.extend([begun.rest for begun in batch]))
        except Exception as error:
            while len(lane.lengths) > before:
                lane.leave(len(lane.lengths) - 1)
            if len(batch) > 1:
                for begun in batch:
                    self._run([begun])
                return
            logger.exception("a prompt failed")
            self._memory.settle(lane)
            self._left(batch[0].answer, error)
            return
        self._joined(lane, [begun.answer for begun in batch], logits)

    def _run_part(self, long: _Long) -> None:
        """Run a part of a long prompt; behind the last one it joins its lane."""
        answer, lane = long.begun.answer, long.begun.lane
        part = answer.prompt[long.done : long.done + self._part]
        try:
            self._models.use(answer.model)
            logits = lanes.prefill(self._models.model, long.cache, part, long.done)
            long.done += len(part)
            if long.done < len(answer.prompt):
                return
            lane.join(lanes.contents(long.cache), long.done)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._memory.spare()
            logger.exception("a prompt failed")
            self._drop_long(error)
            return
        self._long = None
        self._joined(lane, [answer], logits)

    def _joined(self, lane: Lane, answers: list[Answer], logits: torch.Tensor) -> None:
        """Write the first token of a lane's last rows, which are answers from now on."""
        for _ in answers:
            self._memory.settle(lane)
        group = self._groups.get(id(lane))
        if group is None or group.lane is not lane:
            group = self._groups[id(lane)] = _Group(answers[0].model, lane)
        first = len(group.rows)
        group.rows += answers
        group.chooser = None
        for at, answer in enumerate(answers):
            self._memory.keep(answer.model, answer.prompt, partial(lane.copy_of, first + at))
        self._written(group, first, logits)

    def _drop_long(self, error: BaseException | None = None) -> None:
        """Let the long prompt go."""
        long, self._long = self._long, None
        if long is not None:
            self._memory.settle(long.begun.lane)
            self._left(long.begun.answer, error)

    def _advance(self, group: _Group) -> None:
        """Write one token of each row."""
        if not group.rows:
            return
        try:
            self._models.use(group.model)
            logits = self._retried(lambda: group.lane.decode([a.ids[-1] for a in group.rows]))
        except Exception as error:
            logger.exception("a pass failed")
            self._leave(group, range(len(group.rows)), error)
            return
        self._written(group, 0, logits)

    def _written(self, group: _Group, first: int, logits: torch.Tensor) -> None:
        """Choose a token for the rows from `first` on, and let those go that end by it."""
        rows = group.rows[first:]
        try:
            if first:
                chooser = Chooser([answer.draw for answer in rows], self._device)
            else:
                if group.chooser is None:
                    group.chooser = Chooser([answer.draw for answer in rows], self._device)
                chooser = group.chooser
            ends = self._chosen(rows, chooser, logits)
        except Exception as error:
            logger.exception("tokens could not be chosen")
            self._leave(group, range(first, len(group.rows)), error)
            return
        self._leave(group, [first + at for at, end in enumerate(ends) if end], told=True)

    def _retried(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a pass; where memory is short, once more without all that is not in use."""
        try:
            return run()
        except torch.OutOfMemoryError:
            self._memory.spare()
            return run()

    def _chosen(
        self, answers: Sequence[Answer], chooser: Chooser, logits: torch.Tensor
    ) -> list[bool]:
        """Choose and hand over a token of each answer; return which have ended by it."""
        chosen = chooser.choose(logits)
        events, ends = [], []
        ids, broken = chosen.ids.tolist(), chosen.broken.tolist()
        for place, (answer, token) in enumerate(zip(answers, ids, strict=True)):
            end: Finish | BaseException | None = None
            if broken[place]:
                end = ServeError("the model's logits are not numbers")
            elif token in answer.stop_ids:
                end = "stop"
            else:
                answer.ids.append(token)
                end = "length" if len(answer.ids) == answer.limit else None
            shown = None if broken[place] or token in answer.stop_ids else token
            events.append(Event(answer, shown, chosen.told.get(place), end))
            ends.append(end is not None)
        self._scribe.put(events)
        return ends

    def _leave(
        self,
        group: _Group,
        places: Sequence[int],
        error: BaseException | None = None,
        *,
        told: bool = False,
    ) -> None:
        """Let rows go; their readers hear of an error unless they were told of their end."""
        for place in sorted(places, reverse=True):
            answer, lane = group.rows[place], group.lane
            if error is None:
                n = lane.lengths[place]
                ids = [*answer.prompt, *answer.ids][:n]
                self._memory.keep(group.model, ids, partial(lane.copy_of, place))
            lane.leave(place)
            group.rows[place] = group.rows[-1]
            group.rows.pop()
            group.chooser = None
            self._left(answer, None if told else error)

    def _left(self, answer: Answer, end: Finish | BaseException | None) -> None:
        if end is not None:
            self._scribe.put([Event(answer, end=end)])
        with self._changed:
            self._running -= 1

    def _fail_all(self, error: BaseException) -> None:
        self._drop_long(error)
        for group in self._groups.values():
            self._leave(group, range(len(group.rows)), error)
        if self._closed:
            with self._changed:
                waiting, self._running = list(self._waiting), self._running + len(self._waiting)
                self._waiting.clear()
            for answer in waiting:
                self._left(answer, error)
