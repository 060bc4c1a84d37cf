"""Tool calls in an answer's text: pieces of text in, text and whole calls out.

Three ways of writing them are read, those of the chat templates that have tools:

* Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once or more,
* Llama 3: the answer is `{"name": ..., "parameters": {...}}`, several apart by `;`,
* Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or newer `[TOOL_CALLS]name{...}`.

Marks that are special tokens never reach an answer's text; the JSON behind them is then all there
is, and read as Llama's. What calls no tool of the request stays text, to the last character.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE, MISTRAL = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
PYTHON_TAG = "<|python_tag|>"
BARE = tuple(
    start + key
    for start in ("{", "[{")
    for key in ('"name"', '"type":"function"', '"function"', '"arguments"', '"parameters"', '"id"')
)
"""How an answer begins that is nothing but calls, without its white space."""
NAMED = re.compile(r"\s*([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\]\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    index: int
    """Its place among the answer's calls."""
    name: str
    arguments: str
    """JSON, as clients expect it."""
    id: str
    """Nine letters and digits, which Mistral's templates ask for and others take."""

    def shown(self) -> dict[str, Any]:
        """Return OpenAI's object of a call."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Read:
    """What is known of the answer with one more piece: text that is none, and calls."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class CallReader:
    """Reads the calls out of one answer as it is written.

    Text passes at once, but what may be the beginning of a call is held back until it is known.
    """

    def __init__(self, tools: Collection[str]) -> None:
        """Read calls of tools of these names; none: everything is text."""
        self._tools = frozenset(tools)
        self._held = ""
        self._begun = False  # whether something other than white space was given out as text
        self.found = 0

    def push(self, text: str) -> Read:
        """Take the next piece."""
        if not self._tools:
            return Read(text)
        self._held += text
        return self._joined(self._parts(final=False))

    def flush(self) -> Read:
        """Return what was held back, at the end of the answer."""
        return self._joined(self._parts(final=True))

    def _joined(self, parts: Iterator[str | list[Call]]) -> Read:
        read: list[str | list[Call]] = list(parts)
        text = "".join(part for part in read if isinstance(part, str))
        calls = tuple(call for part in read if not isinstance(part, str) for call in part)
        self._begun = self._begun or bool(text.strip())
        if calls or (self.found and not text.strip()):
            text = text.strip()  # line breaks between calls are the template's, not the answer's
        return Read(text, calls)

    def _parts(self, *, final: bool) -> Iterator[str | list[Call]]:
        """Yield texts and calls from what is held, as far as both are certain."""
        while self._held:
            if self._may_be_bare() and not final:
                return
            bare = self._bare() if final and not self._begun else []
            if bare:
                self._held = ""
                yield bare
                return
            start, mark = self._first_mark()
            if start < 0:
                keep = 0 if final else _unsure(self._held, (OPEN, MISTRAL))
                yield self._take(len(self._held) - keep)
                return
            if start:
                yield self._take(start)
            taken = self._marked(mark, final=final)
            if taken is None:
                return
            yield taken

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text

    def _first_mark(self) -> tuple[int, str]:
        places = [(at, mark) for mark in (OPEN, MISTRAL) if (at := self._held.find(mark)) >= 0]
        return min(places) if places else (-1, "")

    def _marked(self, mark: str, *, final: bool) -> str | list[Call] | None:
        """Read the call behind a mark that the held text begins with; None: it is not whole."""
        if mark == MISTRAL:
            if not final:
                return None
            raw = self._take(len(self._held))
            return self._calls(raw.removeprefix(MISTRAL)) or raw
        end = self._held.find(CLOSE)
        if end < 0 and not final:
            return None
        raw = self._take(len(self._held) if end < 0 else end + len(CLOSE))
        return self._calls(raw.removeprefix(OPEN).removesuffix(CLOSE)) or raw

    def _may_be_bare(self) -> bool:
        """Whether the answer so far may be nothing but calls without a mark."""
        if self._begun or self.found:
            return False
        shown = "".join(self._held.split())
        if PYTHON_TAG.startswith(shown):
            return True
        shown = shown.removeprefix(PYTHON_TAG)
        return any(shown[: len(form)] == form[: len(shown)] for form in BARE)

    def _bare(self) -> list[Call]:
        return self._calls(self._held.strip().removeprefix(PYTHON_TAG))

    def _calls(self, text: str) -> list[Call]:
        """Return the calls that a text consists of; none if it is anything else."""
        found = [_call(value) for value in _values(text)]
        if not found or any(one is None or one[0] not in self._tools for one in found):
            return []
        calls = []
        for name, arguments in (one for one in found if one is not None):
            calls.append(Call(self.found, name, arguments, uuid.uuid4().hex[:9]))
            self.found += 1
        return calls


def _values(text: str) -> list[Any]:
    """Return the JSON values of a text, apart by `;`, `,` or white space; none if it has others."""
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            if text[at].isspace() or text[at] in ";,":
                at += 1
                continue
            if text.startswith(MISTRAL, at):  # newer ones write it before each call
                at += len(MISTRAL)
                continue
            named = NAMED.match(text, at)
            value, at = decoder.raw_decode(text, named.end() if named else at)
            if named:
                value = {"name": named[1], "arguments": value}
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return []
    return values


def _call(value: Any) -> tuple[str, str] | None:
    """Return name and arguments of a call's JSON; None if it is none."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return (name, arguments) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _unsure(text: str, marks: Collection[str]) -> int:
    """Return the length of the longest tail that begins a mark."""
    longest = max(len(mark) for mark in marks) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
