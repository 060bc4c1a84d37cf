"""Tracing: what a chat template writes for all conversations of one shape.

In: messages whose texts are `Slot`s, numbers in place of words. Out: the rendered text as literals
and slots in turn, and what was taken for granted about the words.

A slot is no text. A template may write it, join it to other text and strip blanks that it has not
got; it may ask whether a slot holds, equals, begins or ends with a word, which is noted as a
condition and answered with no; and whether it is text at all. Everything else, by any way, raises.
So a template that has been rendered to its end did the same that it does for all words that fulfil
the conditions: nothing else of a slot could reach its decisions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from jinja2.runtime import Context

from raytune_ft.data.segments import Message
from raytune_ft.data.templating import sandbox_limits as limits
from raytune_ft.data.templating.sandbox import BRACKETS, BUDGET, Environment, compile_template
from raytune_ft.data.templating.signs import PRIVATE
from raytune_ft.errors import DataError

Part = str | int
"""A literal, or the number of the message whose text stands here."""
Kind = Literal["holds", "equals", "begins", "ends"]

FIRST = 0xF0000
"""Private character of the slot 0, while it passes through Jinja as text."""
MOST_SLOTS = 10_000
ANSWERS = {
    "string": True, "iterable": True, "sequence": True, "defined": True, "mapping": False,
    "number": False, "none": False, "undefined": False, "boolean": False, "integer": False,
    "float": False, "true": False, "false": False, "callable": False,
}  # fmt: skip
"""Jinja's tests of kinds, and what they say of a text that is not blank."""
EQUAL = ("eq", "equalto", "==", "ne", "!=")
STRIPPING = ("strip", "lstrip", "rstrip")


class UntraceableError(Exception):
    """A template looked into a slot."""


@dataclass
class Conditions:
    """What is taken for granted about the texts in slots, beside that none is blank."""

    never: set[tuple[int, Kind, str]] = field(default_factory=set)
    """(slot, kind, word): the slot's text does not hold, equal, begin or end with the word."""
    stripped: bool = False
    """No text begins or ends with a blank."""

    def hold(self, texts: Sequence[str]) -> bool:
        """Tell whether texts, by the slots' numbers, fulfil the conditions."""
        if self.stripped and any(text[0].isspace() or text[-1].isspace() for text in texts):
            return False
        return not any(_is(texts[slot], kind, word) for slot, kind, word in self.never)


def _is(text: str, kind: Kind, word: str) -> bool:
    if kind == "holds":
        return word in text
    if kind == "equals":
        return text == word
    return text.startswith(word) if kind == "begins" else text.endswith(word)


class Tracer:
    """One chat template, compiled for slots."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Compile.

        Args:
            source: of the template.
            variables: what it may see beside the conversation.

        Raises:
            ModelError: the source is no template.
            UntraceableError: its own words hold what stands for slots.
        """
        words = (source, *(value for value in variables.values() if isinstance(value, str)))
        if any(map(PRIVATE.search, words)):
            _refuse()
        self._environment = _TracingEnvironment()
        self._template = compile_template(source, self._environment)
        self._variables = variables

    def slot(self, number: int) -> Slot:
        """Return what stands for the text of a message."""
        return self._environment.slot(number)

    def trace(
        self, messages: Sequence[Message], conditions: Conditions, *, add_generation_prompt: bool
    ) -> tuple[Part, ...] | None:
        """Render messages; None if the template refuses them.

        Args:
            messages: of `role` and `content`, a `Slot` or a text.
            conditions: get those of this rendering added.
            add_generation_prompt: leave it open for an answer.

        Raises:
            UntraceableError: what is written depends on the words in slots.
        """
        self._environment.conditions = conditions
        variables = {
            **self._variables,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            BUDGET: limits.Budget(),
            BRACKETS: None,
        }
        try:
            text = "".join(self._template.generate(variables))
        except DataError:
            return None
        except Exception as error:  # whatever Python or Jinja says to a thing that is no text
            raise UntraceableError from error
        return _parts(text)


class Slot:
    """The text of one message, or texts joined to it, that a template may write but not read."""

    __slots__ = ("_environment", "parts")
    __iter__ = None

    def __init__(self, parts: Iterable[Part], environment: _TracingEnvironment) -> None:
        self.parts = tuple(parts)
        self._environment = environment

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Slot):
            return self.parts == other.parts or _refuse()
        return isinstance(other, str) and self._never("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, word: object) -> bool:
        return self._never("holds", word)

    def __hash__(self) -> int:
        raise UntraceableError  # a TypeError would be taken for a missing key by Jinja

    def __str__(self) -> str:
        raise UntraceableError

    def __repr__(self) -> str:
        raise UntraceableError

    def __format__(self, how: str) -> str:
        raise UntraceableError

    def startswith(self, word: object) -> bool:
        """Answer no, under the condition that it is so."""
        return self._never("begins", word)

    def endswith(self, word: object) -> bool:
        """Answer no, under the condition that it is so."""
        return self._never("ends", word)

    def strip(self, characters: object = None) -> Slot:
        """Return the same, under the condition that there is nothing to strip."""
        blank = characters is None or (isinstance(characters, str) and characters.isspace())
        edges = (self.parts[0], self.parts[-1])
        ends = [edges[0][0]] if isinstance(edges[0], str) else []
        ends += [edges[1][-1]] if isinstance(edges[1], str) else []
        if not blank or any(end.isspace() for end in ends):
            _refuse()
        self._environment.conditions.stripped = True
        return self

    lstrip = rstrip = strip

    def written(self) -> str:
        """Return the text that stands for it inside Jinja."""
        return "".join(p if isinstance(p, str) else chr(FIRST + p) for p in self.parts)

    def _never(self, kind: Kind, word: object) -> bool:
        if not isinstance(word, str) or not word or len(self.parts) != 1:
            _refuse()
        slot = self.parts[0]
        if isinstance(slot, str):
            _refuse()
        self._environment.conditions.never.add((slot, kind, word))
        return False


def _refuse() -> NoReturn:
    raise UntraceableError


def _parts(text: str) -> tuple[Part, ...]:
    """Divide a text at the characters that stand for slots."""
    parts: list[Part] = []
    done = 0
    for found in PRIVATE.finditer(text):
        if found.start() > done:
            parts.append(text[done : found.start()])
        parts.append(ord(found.group()) - FIRST)
        done = found.end()
    return (*parts, text[done:]) if done < len(text) else tuple(parts)


class _TracingEnvironment(Environment):
    """The sandbox, for slots."""

    def __init__(self) -> None:
        super().__init__()
        self.conditions = Conditions()
        self.finalize = self._written
        self.concat = self._joined_parts  # type: ignore[method-assign]
        self.filters = {name: _filter(name, call) for name, call in self.filters.items()}
        self.tests = {name: _test(name, call) for name, call in self.tests.items()}  # type: ignore[arg-type]

    def slot(self, number: int) -> Slot:
        """Return the slot of a message."""
        return Slot((number,), self)

    def text_of(self, value: Any) -> str:
        """Return what stands for a slot inside Jinja, or a text as it is."""
        if isinstance(value, Slot):
            return value.written()
        return value if isinstance(value, str) else _refuse()

    def joined(self, *values: Any) -> Any:
        """Write the operator `~`."""
        if not any(isinstance(value, Slot) for value in values):
            return super().joined(*values)
        return self._of("".join(map(self.text_of, values)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        if not isinstance(left, Slot) and not isinstance(right, Slot):
            return super().call_binop(context, operator, left, right)
        if operator != "+":
            _refuse()
        return self._of(self.text_of(left) + self.text_of(right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up a name; of a slot, only what it can answer."""
        if not isinstance(obj, Slot):
            return super().getattr(obj, attribute)
        if attribute not in ("startswith", "endswith", *STRIPPING):
            _refuse()
        return getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look up a key; a slot has none, and is none."""
        if isinstance(obj, Slot) or isinstance(argument, Slot):
            _refuse()
        return super().getitem(obj, argument)

    def _written(self, value: Any) -> Any:
        return value.written() if isinstance(value, Slot) else limits.check_text(value)

    def _joined_parts(self, parts: Iterable[str]) -> Any:
        """Join what a macro or a `set` block has written."""
        return self._of("".join(parts))

    def _of(self, text: str) -> Any:
        return Slot(_parts(text), self) if PRIVATE.search(text) else text


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        # these two give back one of their arguments, without a look at it
        if name in ("default", "d") or not any(isinstance(value, Slot) for value in given):
            return function(*args, **kwargs)
        if isinstance(args[first], Slot) and name == "trim":
            return args[first].strip(*args[first + 1 :], *kwargs.values())
        if isinstance(args[first], Slot) and name == "string":
            return args[first]
        return _refuse()

    return checked


def _test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if name in EQUAL or not any(isinstance(value, Slot) for value in given):
            return function(*args, **kwargs)
        if isinstance(args[first], Slot) and name in ANSWERS:
            return ANSWERS[name]
        return _refuse()

    return checked
