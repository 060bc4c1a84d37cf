"""Signs: where a row's texts end up in what a chat template writes.

In: messages and tools. Out: the same with private characters around every text of the row, and,
after rendering, the text without them and the places between them. Nothing is searched for in the
rendered text; `chat_template` proves the places by rendering without signs and comparing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

Level = Literal["whole", "core", "pieces", "bare"]
LEVELS: tuple[Level, ...] = ("whole", "core", "pieces", "bare")
"""What is put between signs: the text; without the blanks around it; also without the words that
the template looks for in it; nothing. The first level that leaves the rendered text unchanged is
taken, for each group of texts by itself, and for each message where a group has no such level."""

Group = str | tuple[str, int]
"""A group of texts, or what one message has of it."""

Keys = Literal["all", "here", "none"]
"""Which keys of an object are a row's own: also those further in, only its own, none."""

GROUPS = ("system", "user", "assistant", "tool", "reasoning", "calls", "ids", "tools")
TOOLS = -1
"""Owner of the tools' texts; the owner of a message's texts is its index."""
PRIVATE = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
FIRST, LAST = 0xF0000, 0x10FFFD


@dataclass(frozen=True)
class Place:
    """Characters [start, end) of a rendered text that come from a row."""

    start: int
    end: int
    owner: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template writes it."""

    text: str
    places: tuple[Place, ...] = ()
    """Ascending and apart."""
    generated: tuple[tuple[int, int], ...] = ()
    """Spans of the template's `{% generation %}` blocks."""

    def text_of(self, place: Place) -> str:
        """Return the text in a place."""
        return self.text[place.start : place.end]

    def of(self, owner: int) -> list[Place]:
        """Return the places of one owner."""
        return [place for place in self.places if place.owner == owner]


@dataclass
class Signs:
    """Signs for one conversation: characters that occur nowhere in it."""

    first: int
    n_owners: int
    literals: re.Pattern[str] | None
    """Words that the template looks for in texts."""
    special: re.Pattern[str] | None
    """Special tokens."""
    bare: list[str] = field(default_factory=list)
    """Texts that the last marking left without signs, though a row may have any words there."""
    signed: set[tuple[int, str]] = field(default_factory=set)
    """Owner and text of what the last marking put between signs."""
    passed: dict[int, set[str]] = field(default_factory=dict)
    """Per message, those `literals` that the template passes on as it does any words."""

    @classmethod
    def for_conversation(
        cls,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        source: str,
        literals: re.Pattern[str] | None,
        special: re.Pattern[str] | None,
    ) -> Signs:
        """Choose characters; DataError if the conversation uses nearly all private ones.

        Args:
            messages: of the conversation.
            tools: of the conversation.
            source: of the template.
            literals: see the field.
            special: see the field.
        """
        n_owners = (
            len(messages) + 2
        )  # the tools, and a message that the conversation may go on with
        used: set[int] = set()
        for text in (source, *_texts(list(messages)), *_texts(list(tools))):
            used.update(map(ord, PRIVATE.findall(text)))
        first = FIRST
        for code in sorted(used):
            if code - first >= n_owners + 3:
                break
            first = max(first, code + 1)
        if first + n_owners + 3 > LAST:
            raise DataError("the texts use private characters of Unicode throughout; remove them")
        return cls(first, n_owners, literals, special)

    @property
    def brackets(self) -> tuple[str, str]:
        """Signs around what the template says is generated."""
        return chr(self.first + self.n_owners + 1), chr(self.first + self.n_owners + 2)

    def clear(self) -> None:
        """Forget the last marking."""
        self.bare.clear()
        self.signed.clear()

    def words_in(self, text: Any) -> list[str]:
        """List the `literals` in a text."""
        found = self.literals.findall(text) if self.literals and isinstance(text, str) else []
        return sorted(set(found))

    def read(self, text: str) -> Rendered | None:
        """Take the signs out; None if not every pair has a text between it that was put there."""
        found = self._read(text)
        if found is None:
            return None
        missing = {(place.owner, found.text_of(place)) for place in found.places} - self.signed
        if missing:
            written = {(owner, json.dumps(t, ensure_ascii=False)[1:-1]) for owner, t in self.signed}
            missing -= written
        return None if missing else found

    def _read(self, text: str) -> Rendered | None:
        closing, (start_sign, end_sign) = self._closing, self.brackets
        signs = re.compile(f"[{chr(self.first)}-{end_sign}]")
        parts: list[str] = []
        places: list[Place] = []
        generated: list[tuple[int, int]] = []
        done = length = 0
        opened: tuple[int, int] | None = None
        generating: int | None = None
        for found in signs.finditer(text):
            parts.append(text[done : found.start()])
            length += found.start() - done
            done, sign = found.end(), found.group()
            if sign == start_sign:
                if generating is not None:
                    return None
                generating = length
            elif sign == end_sign:
                if generating is None:
                    return None
                generated.append((generating, length))
                generating = None
            elif sign == closing:
                if opened is None:
                    return None
                places.append(Place(opened[0], length, opened[1]))
                opened = None
            elif opened is not None:
                return None
            else:
                opened = (length, ord(sign) - self.first - 1)
        if opened is not None or generating is not None:
            return None
        return Rendered("".join([*parts, text[done:]]), tuple(places), tuple(generated))

    def mark_messages(
        self, messages: Sequence[Message], levels: Mapping[Group, Level]
    ) -> list[Message]:
        """Put signs around the texts of messages, each group at its level."""
        marked = []
        for owner, message in enumerate(messages):
            copy = dict(message)
            role = message["role"]
            if "content" in message:
                level = levels.get((role, owner), levels[role])
                copy["content"] = self._content(message["content"], owner, level, role)
            for key in ("reasoning_content", "thinking"):
                if key in message:
                    level = levels["reasoning"]
                    copy[key] = self._content(message[key], owner, level, "assistant")
            for key in ("name", "tool_call_id"):
                if key in message:
                    copy[key] = self._text(message[key], owner, levels["ids"])
            if "tool_calls" in message:
                copy["tool_calls"] = [
                    self._call(call, owner, levels) for call in message["tool_calls"]
                ]
            marked.append(copy)
        return marked

    def mark_tools(self, tools: Sequence[Mapping[str, Any]], level: Level) -> list[Any]:
        """Put signs around the texts of tools, and the names of their parameters."""
        return [self._deep(tool, TOOLS, level, "none") for tool in tools]

    @property
    def _closing(self) -> str:
        return chr(self.first + self.n_owners)

    def _call(self, call: Any, owner: int, levels: Mapping[Group, Level]) -> Any:
        level = levels["calls"]
        if not isinstance(call, Mapping):
            return self._deep(call, owner, level, "all")
        copy = dict(call)
        for key, value in call.items():
            if key == "function" and isinstance(value, Mapping):
                copy[key] = self._call(value, owner, levels)
            elif key == "id":
                copy[key] = self._text(value, owner, levels["ids"])
            elif key != "type":
                copy[key] = self._deep(value, owner, level, "all")
        return copy

    def _content(self, value: Any, owner: int, level: Level, role: str) -> Any:
        if not isinstance(value, str) or level != "pieces" or self.literals is None:
            return self._text(value, owner, level)
        parts, done = [], 0
        for found in self.literals.finditer(value):
            word = found.group()
            parts.append(self._text(value[done : found.start()], owner, "core"))
            done = found.end()
            # an answer may hold its thoughts between the template's own words
            forged = role != "assistant" or (self.special and self.special.search(word))
            if word in self.passed.get(owner, ()):
                word = self._text(word, owner, "whole")
            elif forged:
                self.bare.append(word)
            parts.append(word)
        return "".join([*parts, self._text(value[done:], owner, "core")])

    def _text(self, value: Any, owner: int, level: Level) -> Any:
        if not isinstance(value, str) or not value:
            return value
        if level == "bare":
            self.bare.append(value)
            return value
        core = value if level == "whole" else value.strip()
        if not core:
            return value
        start = value.index(core)
        self.signed.add((owner, core))
        opening = chr(self.first + 1 + owner)
        return value[:start] + opening + core + self._closing + value[start + len(core) :]

    def _deep(self, value: Any, owner: int, level: Level, free: Keys, key: str = "") -> Any:
        """Mark the texts in a JSON value, and those keys of its objects that a row may choose."""
        if isinstance(value, list | tuple):
            return [self._deep(item, owner, level, free, key) for item in value]
        if not isinstance(value, Mapping):
            # a template that inspects tools looks at types and names, hardly at descriptions
            told = level != "pieces" or owner != TOOLS or key == "description"
            return self._text(value, owner, level if told else "bare")
        copy = {}
        for own, item in value.items():
            name = str(own)
            if level == "whole" and free in ("all", "here"):
                name = self._text(name, owner, level)
            else:
                self.bare.append(name)
            # below a schema's `properties` stand the names of parameters
            below: Keys = "here" if own == "properties" and free == "none" else "none"
            copy[name] = self._deep(item, owner, level, free if free == "all" else below, str(own))
        return copy


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
