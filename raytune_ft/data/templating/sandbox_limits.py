"""Limits of the sandbox: what an operation of a chat template is about to make, measured first.

Every check raises SecurityError where the result would pass a limit; none changes a value.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS

MAX_STEPS = 300_000
"""Turns of all loops and macros of one rendering together."""
MAX_CHARACTERS = 2**24
"""Length of a text."""
MAX_ITEMS = 2**20
"""Length of a list, and places in a nested one."""
MAX_BITS = 2**12
"""Size of a whole number."""
MAX_INDENT = 64
"""Blanks in front of a line."""
MAX_SECONDS = 60.0

PADDING = {"center", "ljust", "rjust", "zfill"}
REFUSED = {"translate", "to_bytes"}
WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(?:\d{5}|\*)")
WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5}|\{)")


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self._steps = 0
        self._written = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count one turn of a loop or macro."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS:,} turns of its loops")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:.0f} seconds")

    def write(self, text: str) -> None:
        """Count what is written."""
        self._written += len(text)
        check_length(self._written)


def check_length(length: int, limit: int = MAX_CHARACTERS) -> None:
    """Check the length of a text or list."""
    if length > limit:
        raise SecurityError(f"a text or list of {length:,}, more than {limit:,}")


def check_text(value: Any) -> Any:
    """Check the text of a value, however often a nested list holds its parts; return the value."""
    if not isinstance(value, list | tuple | dict):
        return value
    characters, places, rest = 0, 0, [value]
    while rest:
        found = rest.pop()
        places += 1
        if isinstance(found, str):
            characters += len(found)
        elif isinstance(found, Mapping):
            rest += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple):
            rest += found
        check_length(places + len(rest), MAX_ITEMS)
        check_length(characters)
    return value


def check_indent(indent: Any) -> None:
    """Check how far a filter is to indent: a number or a text."""
    width = len(indent) if isinstance(indent, str) else indent
    if isinstance(width, int) and width > MAX_INDENT:
        raise SecurityError(f"an indent of more than {MAX_INDENT}")


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Check the operators +, *, ** and %."""
    if operator == "+" and isinstance(left, str | bytes | list | tuple):
        check_length(len(left) + _length(right), _limit(left))
    elif operator == "%" and isinstance(left, str | bytes):
        if WIDE_PERCENT.search(left if isinstance(left, str) else left.decode("latin-1")):
            raise SecurityError("a format with a computed or large width")
        check_text(right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if (bits * right if operator == "**" else bits + right.bit_length()) > MAX_BITS:
            raise SecurityError("a whole number that is too large")
    elif operator == "*":
        for sized, count in ((left, right), (right, left)):
            if isinstance(count, int):
                check_length(_length(sized) * count, _limit(sized))


def check_format(text: str) -> None:
    """Check the text that `format` is called on."""
    if WIDE_FORMAT.search(text):
        raise SecurityError("a format with a computed or large width")


def check_method(owner: Any, name: str, args: list[Any]) -> None:
    """Check a method of a text or number.

    Args:
        owner: the text or number.
        name: of the method.
        args: its arguments.
    """
    if name in REFUSED:
        raise SecurityError(f"the method {name!r}")
    if name in PADDING or name == "expandtabs":
        width = max((value for value in args if isinstance(value, int)), default=0)
        check_length(width * (len(owner) if name == "expandtabs" else 1))
    elif name == "join" and args:
        _check_joined(owner, args[0])
    elif name == "replace" and len(args) > 1:
        _check_replaced(owner, args[0], args[1])


def guarded(name: str) -> Callable[..., Any]:
    """Return one of Jinja's filters that write text, with its arguments checked first."""
    function = FILTERS[name]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            check_text(value)
        if name == "indent":
            check_indent(kwargs.get("width", args[1] if len(args) > 1 else 0))
        elif name == "replace":  # its first argument is Jinja's own
            _check_replaced(*map(str, (*args, *kwargs.values())[1:4]))
        elif name == "join":
            args = (args[0], list(args[1]), *args[2:])
            _check_joined(str(kwargs.get("d", args[2] if len(args) > 2 else "")), args[1])
        return function(*args, **kwargs)

    return checked


def _check_joined(separator: str, values: Any) -> None:
    check_text(values)
    check_length(len(separator) * _length(values))


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    grows = len(new) - len(old)
    if grows > 0:
        places = text.count(old)
        check_length(len(text) + places * grows)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _limit(value: Any) -> int:
    return MAX_ITEMS if isinstance(value, list | tuple) else MAX_CHARACTERS
