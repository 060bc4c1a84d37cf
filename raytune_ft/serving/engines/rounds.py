"""Rounds of the thread that computes: requests at the desk in, tokens to the scribe out.

A round drops requests that nobody reads, runs waiting prompts, several in a pass or a part of a
long one, and then one token of each lane, so that models take turns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import DynamicCache

from raytune_ft.chat.writing import Finish
from raytune_ft.errors import ServeError
from raytune_ft.model import lanes
from raytune_ft.model.generate import room_for
from raytune_ft.model.lanes import Kept, Lane
from raytune_ft.model.sampling import Chooser
from raytune_ft.serving.engines.desk import CLOSING, Desk
from raytune_ft.serving.engines.memory import Memory
from raytune_ft.serving.engines.models import Models
from raytune_ft.serving.engines.scribe import Answer, Event, Scribe

logger = logging.getLogger(__name__)

PROMPT_PART = {"cpu": 256, "cuda": 2048}
"""Tokens of prompts between two tokens of the answers that are under way."""
PROMPTS_AT_ONCE = 16
REST_S = 0.05


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


class Rounds:
    """What is being answered, lane by lane; `work` belongs to one thread."""

    def __init__(self, desk: Desk, models: Models, memory: Memory, scribe: Scribe) -> None:
        self._desk, self._models, self._memory, self._scribe = desk, models, memory, scribe
        self._device = memory.device
        self._words: int = models.model.get_input_embeddings().weight.shape[0]
        self._groups: dict[int, _Group] = {}
        self._long: _Long | None = None
        self.part = PROMPT_PART.get(self._device.type, PROMPT_PART["cpu"])
        self.cached_tokens = 0
        """Tokens of prompts whose keys and values were there already."""
        self.failures = 0
        """Passes that have failed since the last one that gave tokens."""

    def work(self) -> None:
        """Answer until the desk is closed; then end all that is there."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # not inference_mode: bitsandbytes keeps what it makes
        with torch.no_grad():
            while self._desk.wait():
                try:
                    self._round()
                except Exception as error:  # an error of ours; what runs now is lost, no more
                    logger.exception("a round failed")
                    self.failures += 1
                    self._fail_all(error)
        self._fail_all(ServeError(CLOSING))

    def _round(self) -> None:
        self._sweep()
        if self._long is None:
            for batch in self._begin():
                self._run(batch)
        if self._long is not None:
            self._run_part(self._long)
        for group in list(self._groups.values()):
            self._advance(group)
        self._desk.rest(REST_S)

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
        for answer in self._desk.waiting():
            if count == PROMPTS_AT_ONCE or self._desk.running >= self._desk.slots:
                break
            try:
                kept, known = self._memory.prefixes.find(answer.model, answer.prompt)
                rest = len(answer.prompt) - known
                if count and (count + 1) * max(widest, rest) > self.part:
                    break
                begun = self._placed(answer, kept, known)
            except Exception as error:  # of this request's prompt, size or adapter
                if self._desk.take(answer):
                    self._left(answer, error)
                continue
            if begun is None:
                continue
            if rest > self.part:
                self._long = _Long(begun, lanes.growing(kept, known), known)
                break
            batches.setdefault(id(begun.lane), []).append(begun)
            widest, count = max(widest, rest), count + 1
        return list(batches.values())

    def _placed(self, answer: Answer, kept: Kept, known: int) -> _Begun | None:
        """Give a request a row; None while it must wait."""
        if answer.limit <= 0:
            if self._desk.take(answer):
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
        if not self._desk.take(answer):
            self._memory.settle(lane)
            return None
        self.cached_tokens += known
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
            self.failures += 1
            self._memory.settle(lane)
            self._left(batch[0].answer, error)
            return
        self._joined(lane, [begun.answer for begun in batch], logits)

    def _run_part(self, long: _Long) -> None:
        """Run a part of a long prompt; behind the last one it joins its lane."""
        answer, lane = long.begun.answer, long.begun.lane
        part = answer.prompt[long.done : long.done + self.part]
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
            self.failures += 1
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
            self.failures += 1
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
            self.failures += 1
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
        # together: each question to a GPU waits for it
        ids, broken = torch.stack([chosen.ids, chosen.broken.to(chosen.ids.dtype)]).tolist()
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
        self.failures = self.failures + 1 if all(broken) else 0
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
        self._desk.gone()

    def _fail_all(self, error: BaseException) -> None:
        self._drop_long(error)
        for group in self._groups.values():
            self._leave(group, range(len(group.rows)), error)
        if self._desk.closed:
            for answer in self._desk.take_all():
                self._left(answer, error)
