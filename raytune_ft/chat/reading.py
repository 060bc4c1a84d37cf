"""What a person types: a line, or several between triple quotes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
Read = Callable[[], str]


def reader(commands: Iterable[str]) -> Read:
    """Return a function that reads one message, with editing and history on a terminal.

    It raises EOFError at the end of the input and KeyboardInterrupt at Ctrl-C.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return message_reader(_read_plain)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=_keys(),
        completer=WordCompleter(sorted(commands), sentence=True),
        complete_while_typing=False,
        prompt_continuation="...> ",
    )
    return message_reader(lambda: session.prompt("you> "))


def message_reader(read: Read) -> Read:
    """Join what stands between triple quotes to one message; `read` gives a line each time."""

    def message() -> str:
        text = read().rstrip("\n")
        while text.count(QUOTES) == 1:
            text += "\n" + read().rstrip("\n")
        return text.replace(QUOTES, "").strip() if text.count(QUOTES) == 2 else text.strip()

    return message


def _keys() -> KeyBindings:
    """Enter sends; Alt+Enter, which terminals send as Escape and Enter, starts a line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.text.count(QUOTES) == 1:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _start_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _read_plain() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
