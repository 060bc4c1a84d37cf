"""Renderings: one conversation, written by a chat template as often as it takes.

In: a renderer and messages. Out: the text of the first so many messages, plain or with the places
of the row's own texts in it; these are proved by taking the signs out and comparing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.data.segments import Message
from raytune_ft.data.templating.sandbox import Renderer
from raytune_ft.data.templating.signs import GROUPS, LEVELS, TOOLS, Group, Level, Rendered, Signs
from raytune_ft.errors import DataError, ModelError, RaytuneError

PROBE = "x"
GOES_ON: Message = {"role": "user", "content": PROBE}


class Conversation:
    """One conversation and the message that it might go on with."""

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
        self.messages = [*messages, GOES_ON]
        self.last = len(messages) - 1
        """Index of the last message that is the row's."""
        self._tools = list(tools)
        self._signs = signs
        self.prompting = prompting
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
        count = len(self.messages) - 1
        self.plain(count, self.prompting)
        found = self.signed(count, self.prompting)
        if found is None:
            self._choose_levels(count)
            found = self.signed(count, self.prompting)
        if found is None:
            raise ModelError(
                "the model's chat template changes the texts it is given, so that answers cannot "
                "be told from the rest; set model.template to a prompt template"
            )
        self.bare = tuple(dict.fromkeys(self._signs.bare))
        self._check_complete(found)
        return found

    def plain(self, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages as they are."""
        key = (count, add_generation_prompt)
        if key not in self._plain:
            self._plain[key] = self._render(self.messages[:count], add_generation_prompt)
        return self._plain[key]

    def signed(self, count: int, add_generation_prompt: bool) -> Rendered | None:
        """Render the first `count` messages with signs; None if these change what is written."""
        self._signs.clear()
        messages = self._signs.mark_messages(self.messages[:count], self._levels)
        tools = self._signs.mark_tools(self._tools, self._levels["tools"])
        try:
            text = self._render(messages, add_generation_prompt, tools, self._brackets)
        except RaytuneError:
            return None
        found = self._signs.read(text)
        if found is None or found.text != self.plain(count, add_generation_prompt):
            return None
        return found

    def after_probe(self, index: int) -> str | None:
        """Return what is written behind an answer of one word in place of this, at the very end.

        None if the place of the word cannot be proved.
        """
        messages = [*self.messages[:index], {"role": "assistant", "content": PROBE}]
        plain = self._render(messages, False)
        self._signs.clear()
        levels: dict[Group, Level] = dict.fromkeys(GROUPS, "bare")
        levels["assistant", index] = "whole"
        marked = self._signs.mark_messages(messages, levels)
        found = self._signs.read(self._render(marked, False))
        own = found.of(index) if found else []
        if found is None or not own or found.text != plain:
            return None
        return plain[own[-1].end :]

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        brackets: tuple[str, str] | None = None,
    ) -> str:
        variables = {
            **self._variables,
            "messages": list(messages),
            "tools": (self._tools if tools is None else list(tools)) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._renderer.render(variables, brackets)

    def _check_complete(self, found: Rendered) -> None:
        """Refuse messages and tools that the template leaves out; it may do so with thoughts."""
        advice = "leave it out, or choose another model.template"
        written = {(place.owner, found.text_of(place)) for place in found.places}
        owners = {owner for owner, _ in written}
        for owner in sorted({owner for owner, _ in self._signs.signed} - owners):
            if owner == TOOLS:
                raise DataError(f"the model's chat template has no words for tools; {advice}")
            if (role := self.messages[owner]["role"]) != "assistant":
                raise DataError(
                    f"message {owner + 1}: the model's chat template leaves out this message of "
                    f"role '{role}'; {advice}"
                )
        for owner, message in enumerate(self.messages):
            names = {(owner, name) for name in _called(message)}
            if names & self._signs.signed and not names & written:
                raise DataError(
                    f"message {owner + 1}: the model's chat template has no words for tool_calls; "
                    f"{advice}"
                )

    def _choose_levels(self, count: int) -> None:
        """Take for each group of texts the first level that changes nothing."""
        bare: dict[Group, Level] = dict.fromkeys(GROUPS, "bare")
        self._levels = bare
        if self.signed(count, self.prompting) is None:
            self._brackets = None
        chosen: dict[Group, Level] = {
            group: self._first_level(count, bare, group) for group in GROUPS
        }
        for owner, message in enumerate(self.messages[:count]):
            group = message["role"]
            if chosen[group] in ("pieces", "bare"):
                # it may be this one message, or another one, that has to do without
                chosen[group, owner] = self._first_level(count, chosen, (group, owner))
                if chosen[group, owner] == "pieces":
                    self._levels = chosen
                    self._mark_words(count, owner)
        self._levels = chosen

    def _mark_words(self, count: int, owner: int) -> None:
        """Put signs around those words of the template, too, that it leaves alone in a text."""
        passed = self._signs.passed.setdefault(owner, set())
        for word in self._signs.words_in(self.messages[owner]["content"]):
            passed.add(word)
            if self.signed(count, self.prompting) is None:
                passed.discard(word)

    def _first_level(self, count: int, levels: Mapping[Group, Level], group: Group) -> Level:
        for level in LEVELS:
            self._levels = {**levels, group: level}
            if self.signed(count, self.prompting) is not None:
                return level
        return "bare"


def _called(message: Message) -> list[str]:
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    return [call["name"] for call in calls if isinstance(call.get("name"), str)]
