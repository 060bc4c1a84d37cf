"""Answers: where the assistant's turns stand in what a chat template writes.

In: a renderer and a conversation. Out: the text, the places of the row's own texts in it, and for
every answer where it begins and ends. No span is guessed: each follows from comparing renderings,
and where they do not agree the conversation is refused.

The rules. The whole conversation is rendered once, as it will stand before the model; a template
that rewrites earlier turns (Qwen 3 leaves out their reasoning) has rewritten them there, and they
are learned as they stand.

An answer begins where the prompt for it ends: the messages before it rendered with
`add_generation_prompt=True` are a prefix of the text. So what the template writes into a prompt
after the role (`<think>`, an empty pair of think tags) is not learned, and what it leaves to the
model is. For the last answer nothing else is accepted: training text and prompt must be the same.
An earlier answer whose prompt has been rewritten since begins after what that prompt writes behind
the last text of a row in it, which must follow the same text here; or, where the prompt opens a
thought that an earlier turn has not, where the two depart, behind the role.

An answer ends after the last special token that the template writes behind it whether or not the
conversation goes on. A template that ends no turn leaves the beginning of the next turn, if that is
a token the model stops at (GLM 4); otherwise the end-of-text token is put there.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from raytune_ft.data.templating.renderings import Conversation
from raytune_ft.data.templating.signs import Place, Rendered
from raytune_ft.errors import DataError, ModelError, RaytuneError


@dataclass(frozen=True)
class Ends:
    """Tokens that end an answer."""

    special: re.Pattern[str] | None
    """Matches any special token."""
    stops: Collection[str]
    """Texts of those at which the model stops."""


@dataclass(frozen=True)
class Answer:
    """Where one answer stands: characters [start, end) of the text."""

    start: int
    end: int
    message: int
    """Index of its message."""
    reply_end: int
    """Where its end-of-turn token begins; `end` if there is none."""
    closed: bool
    """Whether the template ends the turn; if not, the end-of-text token must follow."""


class Locator:
    """Locates the answers of one conversation."""

    def __init__(self, conversation: Conversation, full: Rendered, ends: Ends) -> None:
        """Take a conversation, the whole of it as `render` gives it, and what ends an answer."""
        self._conversation = conversation
        self._full = full
        self._ends = ends

    def locate(self, index: int, earliest: int) -> Answer:
        """Locate an answer in the whole.

        Args:
            index: of the answer's message.
            earliest: where the answer before it ends.

        Raises:
            DataError: the template cannot prompt for this answer.
            ModelError: the answer's span cannot be proved.
        """
        start = self._start(index)
        if start is None or start < earliest:
            raise ModelError(
                f"message {index + 1}: the model's chat template writes this answer in another way "
                "than it prompts for it, so it cannot be trained as it will be used; give it "
                "reasoning_content if the prompt opens a thought, or set model.template to a "
                "prompt template"
            )
        answer = self._ended(index, start)
        for place in self._full.places:
            inside = answer.start < place.end and place.start < answer.end
            echo = place.owner == index and place.start >= answer.end
            if inside != (place.owner == index) and not echo:
                raise ModelError(
                    f"message {index + 1}: the model's chat template mixes this answer with other "
                    "messages; set model.template to a prompt template"
                )
        return answer

    def _start(self, index: int) -> int | None:
        try:
            prompt = self._conversation.plain(index, True)
        except RaytuneError as error:
            if index > 0:
                raise
            raise DataError(
                "message 1 is an answer, and the model's chat template cannot prompt for one with "
                "nothing before it; let the conversation start with role 'user'"
            ) from error
        if self._full.text.startswith(prompt):
            return len(prompt)
        if index == self._conversation.last and not self._conversation.prompting:
            return None
        return self._start_after_rewriting(index)

    def _own(self, full: Rendered, index: int) -> list[Place]:
        """Return the places of an answer's texts, without echoes of them in later messages.

        Echoes (gpt-oss names the function again before its result) are those that the answer has
        not got where the conversation ends with it.
        """
        own = full.of(index)
        calls = "tool_calls" in self._conversation.messages[index]
        alone = self._conversation.signed(index + 1, False) if calls else None
        if alone is None or index == self._conversation.last:
            return own
        texts = [alone.text_of(place) for place in alone.of(index)]
        if texts and texts == [full.text_of(place) for place in own[: len(texts)]]:
            return own[: len(texts)]
        return own

    def _start_after_rewriting(self, index: int) -> int | None:
        """Find where an earlier answer begins, by the texts around it."""
        prompt = self._conversation.signed(index, True)
        if prompt is None:
            return None
        begin, tail = 0, prompt.text
        if prompt.places:
            last = prompt.places[-1]
            same = self._full.of(last.owner)
            if not same or self._full.text_of(same[-1]) != prompt.text_of(last):
                return None
            begin, tail = same[-1].end, prompt.text[last.end :]
        if self._full.text.startswith(tail, begin):
            return begin + len(tail)
        return self._departure(index, begin, prompt)

    def _departure(self, index: int, begin: int, prompt: Rendered) -> int | None:
        """Find where an earlier answer departs from what the prompt for it writes after the role.

        Such a prompt opens a thought that is gone, or empty, in an earlier turn.
        """
        closed = self._conversation.signed(index, False)
        if closed is None or closed.places != prompt.places:
            return None
        last = prompt.places[-1].end if prompt.places else 0
        role, tail = closed.text[last:], prompt.text[last:]
        own = self._full.of(index)
        limit = own[0].start if own else len(self._full.text)
        length = len(_common(self._full.text[begin:limit], tail, None))
        if not tail.startswith(role) or length <= len(role):
            return None
        return begin + length

    def _ended(self, index: int, start: int) -> Answer:
        """Find where an answer ends that begins at `start`."""
        own = self._own(self._full, index)
        anchor = max([start, *(place.end for place in own)])
        following = [place.start for place in self._full.places if place.start >= anchor]
        here = self._full.text[anchor : min(following, default=len(self._full.text))]
        rest = self._otherwise(index, anchor)
        if rest is None and index == self._conversation.last:
            rest = here
        elif rest is None or (not own and _ending(here, rest, self._ends) is None):
            rest = self._after_probe(index)
            blanks = len(here) - len(here.lstrip())
            anchor, here = anchor + blanks, here[blanks:]
        found = _ending(here, rest, self._ends)
        if found is None and not own and index == self._conversation.last:
            # an empty answer: all that the template writes there is its end
            found = _last_run(here, self._ends.special)
        if found:
            return Answer(start, anchor + found[1], index, anchor + found[0], closed=True)
        end = len(_common(here, rest, self._ends.special))
        token = self._ends.special.match(here, end) if self._ends.special else None
        if token and (token.group() in self._ends.stops or _begins_special(rest[end:], self._ends)):
            return Answer(start, anchor + token.end(), index, anchor + end, closed=True)
        return Answer(start, anchor + end, index, anchor + end, closed=False)

    def _otherwise(self, index: int, anchor: int) -> str | None:
        """Return what follows an answer if the conversation ended there, or, for the last, went on.

        None if the template does not write the answer's last text in such a conversation.
        """
        own = self._own(self._full, index)
        count = index + (2 if index == self._conversation.last else 1)
        try:
            text = self._conversation.plain(count, False)
        except RaytuneError:
            return None
        if text[:anchor] == self._full.text[:anchor]:
            return text[anchor:]
        signed = self._conversation.signed(count, False) if own else None
        same = self._own(signed, index) if signed else []
        if signed is None or not same or signed.text_of(same[-1]) != self._full.text_of(own[-1]):
            return None
        return text[same[-1].end :]

    def _after_probe(self, index: int) -> str:
        found = self._conversation.after_probe(index)
        if found is None:
            raise ModelError(
                f"message {index + 1}: the end of this answer cannot be told in what the model's "
                "chat template writes; set model.template to a prompt template"
            )
        return found


def _ending(here: str, rest: str, ends: Ends) -> tuple[int, int] | None:
    """Return the span of the tokens that end a turn, by two ways in which a text goes on there."""
    return _last_run(_common(here, rest, ends.special), ends.special)


def _begins_special(text: str, ends: Ends) -> bool:
    return ends.special is not None and ends.special.match(text) is not None


def _common(one: str, other: str, special: re.Pattern[str] | None) -> str:
    """Return the common beginning of two texts, without part of a special token at its end."""
    pairs = enumerate(zip(one, other, strict=False))
    length = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    common = one[:length]
    if special is not None:
        for text in (one, other):
            for found in special.finditer(text):
                if found.start() < len(common) < found.end():
                    common = common[: found.start()]
    return common


def _last_run(text: str, special: re.Pattern[str] | None) -> tuple[int, int] | None:
    """Return the span of the last special tokens in a text that follow one another directly."""
    run: tuple[int, int] | None = None
    for found in special.finditer(text) if special else ():
        start = run[0] if run and run[1] == found.start() else found.start()
        run = (start, found.end())
    return run
