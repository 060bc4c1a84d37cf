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
the last text of a row in it, which must follow the same text here.

An answer ends after the last special token that the template writes behind it whether or not the
conversation goes on. A template that ends no turn leaves the beginning of the next turn, if that is
a token the model stops at (GLM 4); otherwise the end-of-text token is put there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.data.segments import Message
from raytune_ft.data.templating.sandbox import Renderer
from raytune_ft.data.templating.signs import GROUPS, LEVELS, Group, Level, Place, Rendered, Signs
from raytune_ft.errors import DataError, ModelError, RaytuneError

PROBE = "x"
GOES_ON: Message = {"role": "user", "content": PROBE}


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


class Conversation:
    """One conversation, rendered as often as it takes to locate its answers."""

    def __init__(
        self,
        renderer: Renderer,
        variables: Mapping[str, Any],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        signs: Signs,
        *,
        prompting: bool,
    ) -> None:
        self._renderer = renderer
        self._variables = variables
        self._messages = [*messages, GOES_ON]
        self._last = len(messages) - 1
        self._tools = list(tools)
        self._signs = signs
        self._prompting = prompting
        self._levels: dict[Group, Level] = dict.fromkeys(GROUPS, "whole")
        self._brackets = signs.brackets if renderer.has_generation_marks else None
        self._plain: dict[tuple[int, bool], str] = {}
        self.bare: tuple[str, ...] = ()
        """Texts of the row that `render` could not mark."""

    def render(self) -> Rendered:
        """Render the whole and find the places of the row's texts.

        Raises:
            DataError: the template refuses the messages.
            ModelError: it fails, or what it writes depends on signs around every text.
        """
        count = len(self._messages) - 1
        self.plain(count, self._prompting)
        found = self.signed(count, self._prompting)
        if found is None:
            self._choose_levels(count)
            found = self.signed(count, self._prompting)
        if found is None:
            raise ModelError(
                "the model's chat template changes the texts it is given, so that answers cannot "
                "be told from the rest; set model.template to a prompt template"
            )
        self.bare = tuple(dict.fromkeys(self._signs.bare))
        return found

    def locate(self, full: Rendered, index: int, earliest: int, ends: Ends) -> Answer:
        """Locate an answer in the whole.

        Args:
            full: the whole, see `render`.
            index: of the answer's message.
            earliest: where the answer before it ends.
            ends: tokens that end an answer.

        Raises:
            DataError: the template cannot prompt for this answer.
            ModelError: the answer's span cannot be proved.
        """
        start = self._start(full, index)
        if start is None or start < earliest:
            raise ModelError(
                f"message {index + 1}: the model's chat template writes this answer in another way "
                "than it prompts for it, so it cannot be trained as it will be used; give it "
                "reasoning_content if the prompt opens a thought, or set model.template to a "
                "prompt template"
            )
        answer = self._ended(full, index, start, ends)
        for place in full.places:
            inside = answer.start < place.end and place.start < answer.end
            if inside != (place.owner == index) and place.end > place.start:
                raise ModelError(
                    f"message {index + 1}: the model's chat template mixes this answer with other "
                    "messages; set model.template to a prompt template"
                )
        return answer

    def plain(self, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages as they are."""
        key = (count, add_generation_prompt)
        if key not in self._plain:
            self._plain[key] = self._render(
                self._messages[:count], self._tools, add_generation_prompt, None
            )
        return self._plain[key]

    def signed(self, count: int, add_generation_prompt: bool) -> Rendered | None:
        """Render the first `count` messages with signs; None if these change what is written."""
        self._signs.clear()
        messages = self._signs.mark_messages(self._messages[:count], self._levels)
        tools = self._signs.mark_tools(self._tools, self._levels["tools"])
        try:
            text = self._render(messages, tools, add_generation_prompt, self._brackets)
        except RaytuneError:
            return None
        found = self._signs.read(text)
        if found is None or found.text != self.plain(count, add_generation_prompt):
            return None
        return found

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        add_generation_prompt: bool,
        brackets: tuple[str, str] | None,
    ) -> str:
        variables = {
            **self._variables,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._renderer.render(variables, brackets)

    def _choose_levels(self, count: int) -> None:
        """Take for each group of texts the first level that changes nothing."""
        bare: dict[Group, Level] = dict.fromkeys(GROUPS, "bare")
        self._levels = bare
        if self.signed(count, self._prompting) is None:
            self._brackets = None
        chosen: dict[Group, Level] = {
            group: self._first_level(count, bare, group) for group in GROUPS
        }
        for owner, message in enumerate(self._messages[:count]):
            group = message["role"]
            if chosen[group] in ("pieces", "bare"):
                # it may be this one message, or another one, that has to do without
                chosen[group, owner] = self._first_level(count, chosen, (group, owner))
                if chosen[group, owner] == "pieces":
                    self._levels = chosen
                    self._join_pieces(count, owner)
        self._levels = chosen

    def _join_pieces(self, count: int, owner: int) -> None:
        """Put those words of the template that it leaves alone in this text between signs too."""
        joined = self._signs.joined.setdefault(owner, set())
        for word in self._signs.words_in(self._messages[owner]["content"]):
            joined.add(word)
            if self.signed(count, self._prompting) is None:
                joined.discard(word)

    def _first_level(self, count: int, levels: Mapping[Group, Level], group: Group) -> Level:
        for level in LEVELS:
            self._levels = {**levels, group: level}
            if self.signed(count, self._prompting) is not None:
                return level
        return "bare"

    def _start(self, full: Rendered, index: int) -> int | None:
        try:
            prompt = self.plain(index, True)
        except RaytuneError as error:
            if index > 0:
                raise
            raise DataError(
                "message 1 is an answer, and the model's chat template cannot prompt for one with "
                "nothing before it; let the conversation start with role 'user'"
            ) from error
        if full.text.startswith(prompt):
            return len(prompt)
        if index == self._last and not self._prompting:
            return None
        return self._start_after_rewriting(full, index)

    def _start_after_rewriting(self, full: Rendered, index: int) -> int | None:
        """Find where an earlier answer begins, by the texts around it."""
        prompt = self.signed(index, True)
        if prompt is None:
            return None
        begin, tail = 0, prompt.text
        if prompt.places:
            last = prompt.places[-1]
            same = full.of(last.owner)
            if not same or _text(full, same[-1]) != _text(prompt, last):
                return None
            begin, tail = same[-1].end, prompt.text[last.end :]
        if full.text.startswith(tail, begin):
            return begin + len(tail)
        own = full.of(index)
        # the prompt wrote more than the role, and that is gone from an earlier turn
        if own and own[0].start > begin and tail.startswith(full.text[begin : own[0].start]):
            return own[0].start
        return None

    def _ended(self, full: Rendered, index: int, start: int, ends: Ends) -> Answer:
        """Find where an answer ends that begins at `start`."""
        own = full.of(index)
        anchor = max([start, *(place.end for place in own)])
        following = [place.start for place in full.places if place.start >= anchor]
        here = full.text[anchor : min(following, default=len(full.text))]
        rest = self._otherwise(full, index, anchor)
        if rest is None and index == self._last:
            rest = here
        elif rest is None or (not own and _ending(here, rest, ends) is None):
            rest = self._after_probe(index)
            blanks = len(here) - len(here.lstrip())
            anchor, here = anchor + blanks, here[blanks:]
        found = _ending(here, rest, ends)
        if found is None and not own and index == self._last:
            # an empty answer: all that the template writes there is its end
            found = _last_run(here, ends.special)
        if found:
            return Answer(start, anchor + found[1], index, anchor + found[0], closed=True)
        end = len(_common(here, rest, ends.special))
        token = ends.special.match(here, end) if ends.special else None
        if token and (token.group() in ends.stops or _begins_special(rest[end:], ends)):
            return Answer(start, anchor + token.end(), index, anchor + end, closed=True)
        return Answer(start, anchor + end, index, anchor + end, closed=False)

    def _otherwise(self, full: Rendered, index: int, anchor: int) -> str | None:
        """Return what follows an answer if the conversation ended there, or, for the last, went on.

        None if the template does not write the answer's last text in such a conversation.
        """
        own = full.of(index)
        count = index + (2 if index == self._last else 1)
        try:
            text = self.plain(count, False)
        except RaytuneError:
            return None
        if text[:anchor] == full.text[:anchor]:
            return text[anchor:]
        signed = self.signed(count, False) if own else None
        same = signed.of(index) if signed else []
        if signed is None or not same or _text(signed, same[-1]) != _text(full, own[-1]):
            return None
        return text[same[-1].end :]

    def _after_probe(self, index: int) -> str:
        """Return what a template writes behind an answer of one word, at a conversation's end."""
        messages = [*self._messages[:index], {"role": "assistant", "content": PROBE}]
        plain = self._render(messages, self._tools, False, None)
        self._signs.clear()
        levels: dict[Group, Level] = dict.fromkeys(GROUPS, "bare")
        levels["assistant", index] = "whole"
        marked = self._signs.mark_messages(messages, levels)
        found = self._signs.read(self._render(marked, self._tools, False, None))
        own = found.of(index) if found else []
        if found is None or not own or found.text != plain:
            raise ModelError(
                f"message {index + 1}: the end of this answer cannot be told in what the model's "
                "chat template writes; set model.template to a prompt template"
            )
        return plain[own[-1].end :]


def _text(rendered: Rendered, place: Place) -> str:
    return rendered.text[place.start : place.end]


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
